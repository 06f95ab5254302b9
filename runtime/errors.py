"""What can go wrong, as types.

PreScopeError                 everything a person may be shown; carries the next step
├── ConfigError               a setting or command-line value that cannot be used
├── ModelError                a model that cannot be loaded
│   ├── InvalidNumbersError   it computes what is no number: its weights are damaged
│   ├── ModelFilesError       files are missing, damaged or hostile
│   └── UnsupportedModelError the family or format is not one we can run
├── MemoryPlanError           the model does not fit the stated budget
├── DiskError                 a disk has no room or refuses to be written
├── RequestError              a generation request that cannot be served as asked
│   ├── ContextLengthError    the prompt is longer than the context
│   └── TemplateError         the chat template refused or failed
├── TransferError             a copy to the device failed and could not be repeated
├── EngineDiedError           the engine process ended; the text so far is kept
├── BusyError                 more requests than the queue holds
├── CancelledError            the person or the caller asked to stop
└── ProtocolError             the two processes disagree about the wire format
"""

from __future__ import annotations


class PreScopeError(Exception):
    """An error meant for a person: `message` names the thing and the numbers."""

    def __init__(self, message: str, next_step: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step

    def to_json(self) -> dict[str, str]:
        """Return the record that `--json`, the API and the engine pipe carry."""
        return {
            "type": type(self).__name__,
            "message": self.message,
            "next_step": self.next_step,
        }


class ConfigError(PreScopeError):
    """A setting or command-line value cannot be used."""


class ModelError(PreScopeError):
    """A model cannot be loaded."""


class InvalidNumbersError(ModelError):
    """The model computed NaN or infinities."""


class ModelFilesError(ModelError):
    """The model's files are missing, damaged or hostile."""


class UnsupportedModelError(ModelError):
    """The model's family or format is not one that can run here."""


class MemoryPlanError(PreScopeError):
    """The model does not fit the stated budget."""


class DiskError(PreScopeError):
    """A disk has no room for what is to be kept on it, or refuses to be written."""


class RequestError(PreScopeError):
    """A generation request cannot be served as asked."""


class ContextLengthError(RequestError):
    """The prompt needs more tokens than the context holds."""


class TemplateError(RequestError):
    """The model's chat template refused the messages or failed on them."""


class TransferError(PreScopeError):
    """A copy to the device failed and could not be repeated."""


class EngineDiedError(PreScopeError):
    """The engine process ended while it was needed."""


class BusyError(PreScopeError):
    """The engine already has as many requests as it may hold."""


class CancelledError(PreScopeError):
    """The person or the caller asked to stop."""


class ProtocolError(PreScopeError):
    """The app and the engine process disagree about the wire format."""


def error_from_json(record: dict[str, str]) -> PreScopeError:
    """Rebuild the error that `PreScopeError.to_json` described.

    A type this version does not know becomes a plain `PreScopeError`.
    """
    kinds = {kind.__name__: kind for kind in _descendants(PreScopeError)}
    kind = kinds.get(record.get("type", ""), PreScopeError)
    return kind(record.get("message", ""), record.get("next_step", ""))


def _descendants(kind: type[PreScopeError]) -> list[type[PreScopeError]]:
    children = kind.__subclasses__()
    return children + [below for child in children for below in _descendants(child)]
