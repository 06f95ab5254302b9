"""The learned heads as a torch module for training, and the statistics that sort layers in groups.

What it computes is what `runtime.predictor_heads.score` computes from the packed weights; a test
holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from assets.training.predictor_data import Routing
from runtime.predictor_heads import Head, Heads, Packed, Tables, heads_from, pack, score

DISTANCES = 2
_FORGETTING = 0.15
"""Share of training rows that know nothing of earlier tokens, as rows of a batch do."""


@dataclass(frozen=True)
class Sizes:
    """Widths of the heads: r compressed, n inner, c for a token's code."""

    compressed: int = 22
    inner: int = 32
    code: int = 32
    half_life_tokens: float = 4.0


def past_of(data: Routing, experts: int, half_life_tokens: float) -> torch.Tensor:
    """(rows, layers, experts) half: earlier choices of the same chat, faded per token."""
    rows, layers, _ = data.chosen.shape
    fade = 0.5 ** (1 / half_life_tokens)
    hot = torch.zeros(rows, layers, experts).scatter_(2, data.chosen, 1.0)
    out = torch.zeros(rows, layers, experts, dtype=torch.half)
    memory = torch.zeros(layers, experts)
    for row, start in enumerate(data.starts.tolist()):
        if start:
            memory.zero_()
        out[row] = memory
        memory.mul_(fade).add_(hot[row])
    return out


def layer_groups(data: Routing, experts: int, rows: int = 20_000) -> tuple[list[str], list[dict]]:
    """Sort layers 0 .. L-2 into near input, middle, near output, by what was measured.

    Towards both ends routing is more correlated with the next layer's and gate weights are more
    skewed, in the middle router inputs resemble each other more (arXiv 2509.23638). The middle is
    the run of layers inside for which that holds best; there is none if it holds for none.
    """
    data = data.rows(0, rows)
    layers = data.chosen.shape[1]
    hot = torch.zeros(len(data), layers, experts).scatter_(2, data.chosen, 1.0)
    figures = []
    for layer in range(layers - 1):
        here, after = (hot[:, t] - hot[:, t].mean(0) for t in (layer, layer + 1))
        spread = here.norm(dim=0)[:, None] * after.norm(dim=0)[None] + 1e-9
        correlation = (here.T @ after / spread).abs().amax(0).mean()
        near, far = (data.inputs[:, t].float() for t in (layer, layer + 1))
        figures.append(
            {
                "layer": layer,
                "correlation": round(float(correlation), 4),
                "skew": round(float(data.weights[:, layer].float().amax(1).mean()), 4),
                "cosine": round(float(functional.cosine_similarity(near, far).mean()), 4),
            }
        )
    columns = torch.tensor([[f["cosine"], -f["correlation"], -f["skew"]] for f in figures])
    columns = (columns - columns.mean(0)) / (columns.std(0) + 1e-9)
    middling = columns.sum(1)
    best, begin, end = 0.0, 1, 1
    for first in range(1, layers - 2):
        for last in range(first + 1, layers - 1):
            inside = torch.zeros(layers - 1, dtype=torch.bool)
            inside[first:last] = True
            gap = float(middling[inside].mean() - middling[~inside].mean())
            # Between-group variance, so that one odd layer does not make a group.
            worth = gap * int(inside.sum()) * int((~inside).sum()) if gap > 0 else 0.0
            if worth > best:
                best, begin, end = worth, first, last
    names = ["near input"] * begin + ["middle"] * (end - begin)
    return names + ["near output"] * (layers - 1 - len(names)), figures


class Network(nn.Module):
    """All heads of one model. `groups` names the group of each layer but the last."""

    def __init__(
        self,
        data: Routing,
        routers: torch.Tensor,
        gains: torch.Tensor,
        vocabulary: int,
        groups: list[str],
        sizes: Sizes,
    ) -> None:
        super().__init__()
        layers, experts, hidden = routers.shape
        self.sizes, self.experts, self.layers = sizes, experts, layers
        r, n, outputs = sizes.compressed, sizes.inner, DISTANCES * experts
        self.width = n + outputs
        self.code = nn.Parameter(torch.randn(vocabulary, sizes.code) * 0.3)
        self.said = nn.Parameter(torch.randn(sizes.code, layers * self.width) * 0.05)
        self.previous_code = nn.Parameter(torch.randn(vocabulary, sizes.code) * 0.3)
        self.previous_said = nn.Parameter(torch.randn(sizes.code, self.width) * 0.05)
        self.bias = nn.Parameter(torch.zeros(layers, self.width))
        self.past = nn.Parameter(torch.zeros(layers, experts, DISTANCES, self.width))
        with torch.no_grad():
            self.bias[:, n:] = -2.0
        self.places = nn.ModuleList()
        for place in range(layers):
            source = place - 1 if place else layers - 1
            x = data.inputs[:20_000, source].float()
            directions = torch.linalg.eigh(x.T @ x)[1][:, -r:].T.contiguous()
            part = nn.ParameterDict()
            part["compress"] = nn.Parameter(directions)
            first = torch.zeros(self.width, r)
            first[:n] = torch.randn(n, r) / r**0.5
            for d in range(DISTANCES):
                target = place + d
                if place and target < layers:
                    reused = routers[target] * (gains[target] / gains[source])
                    rows = slice(n + d * experts, n + (d + 1) * experts)
                    first[rows] = reused @ directions.T
            part["first"] = nn.Parameter(first)
            part["second"] = nn.Parameter(torch.zeros(outputs, n))
            if place:
                part["routed"] = nn.Parameter(torch.zeros(experts, self.width))
            if place and groups[place - 1] == "middle":
                part["gate"] = nn.Parameter(torch.zeros(n, r))
                part["inner"] = nn.Parameter(torch.randn(n, n) * 0.5 / n**0.5)
            self.places.append(part)

    def forward(self, rows: Rows, forgetting: bool) -> list[torch.Tensor]:
        """(rows, distances, experts) scores of every place."""
        count, n = len(rows.tokens), self.sizes.inner
        keep = torch.ones(count, 1)
        if forgetting:
            keep = (torch.rand(count, 1) > _FORGETTING).float()
        base = (self.code[rows.tokens] @ self.said).view(count, self.layers, self.width) + self.bias
        scores = []
        for place, part in enumerate(self.places):
            y = base[:, place]
            past = rows.past[:, place].float() @ self.past[place, :, 0]
            if place + 1 < self.layers:
                past = past + rows.past[:, place + 1].float() @ self.past[place + 1, :, 1]
            if not place:
                past = past + self.previous_code[rows.previous] @ self.previous_said
            y = y + keep * past
            x = rows.inputs[:, place - 1].float() if place else keep * rows.state.float()
            z = x @ part["compress"].T
            y = y + z @ part["first"].T
            if place:
                weights = torch.zeros(count, self.experts)
                weights.scatter_(1, rows.chosen[:, place - 1], rows.weights[:, place - 1].float())
                y = y + weights @ part["routed"]
            hidden = functional.gelu(y[:, :n], approximate="tanh")
            if "gate" in part:
                more = functional.gelu(hidden @ part["inner"].T, approximate="tanh")
                hidden = hidden + torch.sigmoid(z @ part["gate"].T) * more
            out = y[:, n:] + hidden @ part["second"].T
            scores.append(out.view(count, DISTANCES, self.experts)[:, : self.layers - place])
        return scores

    def tensors(self, top_k: int) -> dict[str, torch.Tensor]:
        """The weights as the file that ships holds them: big tables as their factors."""
        tensors = self._packed(top_k).tensors()
        del tensors["token"], tensors["previous"]
        for name, code, said in (
            ("token", self.code, self.said),
            ("previous", self.previous_code, self.previous_said),
        ):
            tensors[f"{name}.code"] = code.detach().half()
            tensors[f"{name}.said"] = said.detach().half()
        return tensors

    def heads(self, top_k: int) -> Heads:
        """The weights as the runtime reads them from that file."""
        tensors = self.tensors(top_k)
        return heads_from(tensors, self.layers, top_k, self.sizes.half_life_tokens)

    def _packed(self, top_k: int) -> Heads:
        places = []
        for part in self.places:
            weights = {name: value.detach() for name, value in part.items()}
            compress = pack(weights["compress"])
            rescaled = {
                name: pack(weights[name] * compress.scales)
                for name in ("first", "gate")
                if name in weights
            }
            routed = weights.get("routed")
            inner: Packed | None = pack(weights["inner"]) if "inner" in weights else None
            places.append(
                Head(
                    compress=compress.values,
                    first=rescaled["first"],
                    second=pack(weights["second"]),
                    routed=None if routed is None else routed.half(),
                    gate=rescaled.get("gate"),
                    inner=inner,
                )
            )
        token = (self.code @ self.said).detach().view(-1, self.layers, self.width)
        tables = Tables(
            token=token.half(),
            previous=(self.previous_code @ self.previous_said).detach().half(),
            bias=self.bias.detach().clone(),
            past=self.past.detach().half(),
            half_life_tokens=self.sizes.half_life_tokens,
        )
        return Heads(tuple(places), tables, self.experts, top_k)


@dataclass(frozen=True)
class Rows:
    """A batch for the network: some rows of a recording, and what was known before each."""

    inputs: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor
    tokens: torch.Tensor
    past: torch.Tensor
    previous: torch.Tensor
    state: torch.Tensor

    def pick(self, index: torch.Tensor) -> Rows:
        """Some of the rows."""
        return Rows(*(value[index] for value in vars(self).values()))


def rows_of(data: Routing, experts: int, half_life_tokens: float) -> Rows:
    """Everything a network may know at each row of a recording."""
    previous = torch.zeros_like(data.tokens)
    previous[1:] = data.tokens[:-1]
    state = torch.zeros_like(data.inputs[:, -1])
    state[1:] = data.inputs[:-1, -1]
    state[data.starts] = 0
    past = past_of(data, experts, half_life_tokens)
    return Rows(data.inputs, data.chosen, data.weights, data.tokens, past, previous, state)


@torch.no_grad()
def packed_scores(heads: Heads, rows: Rows) -> list[torch.Tensor]:
    """(rows, distances, experts) scores of every place, from the weights as they ship."""
    tables, layers = heads.tables, len(heads.places)
    base = tables.token[rows.tokens].float() + tables.bias
    past = [rows.past[:, layer].float() for layer in range(layers)]
    scores = []
    for place, head in enumerate(heads.places):
        known = base[:, place] + past[place] @ tables.past[place, :, 0].float()
        if place + 1 < layers:
            known = known + past[place + 1] @ tables.past[place + 1, :, 1].float()
        if place:
            x = rows.inputs[:, place - 1].float()
            out = score(head, known, x, rows.chosen[:, place - 1], rows.weights[:, place - 1])
        else:
            known = known + tables.previous[rows.previous].float()
            out = score(head, known, rows.state.float())
        out = out.view(len(rows.tokens), DISTANCES, heads.experts)
        scores.append(out[:, : layers - place])
    return scores
