"""Sums, differences, products, quotients and units, each with written steps."""

from __future__ import annotations

import random

from assets.training.items import Item, ask, pick

NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
).split()
PLACES = ("Ones", "Tens", "Hundreds", "Thousands")


def _digits(number: int) -> list[int]:
    return [int(c) for c in reversed(str(number))]


def add_steps(a: int, b: int) -> str:
    """Add column by column from the right, saying every carry."""
    left, right = _digits(a), _digits(b)
    width = max(len(left), len(right))
    left += [0] * (width - len(left))
    right += [0] * (width - len(right))
    lines, carry = [f"{a} + {b}"], 0
    for place in range(width):
        total = left[place] + right[place] + carry
        plus = f" + {carry}" if place else ""
        line = f"{PLACES[place]}: {left[place]} + {right[place]}{plus} = {total}"
        if place < width - 1:
            line += f", write {total % 10}, carry {total // 10}"
        carry = total // 10
        lines.append(line + ".")
    return "\n".join([*lines, f"So the answer is **{a + b}**."])


def subtract_steps(a: int, b: int) -> str:
    """Subtract column by column, saying every borrow; a negative result turns the two around."""
    if a < b:
        body = subtract_steps(b, a).split("\n")[:-1]
        return "\n".join(
            [f"{a} is smaller than {b}, so the result is negative.", *body]
            + [f"So the answer is **-{b - a}**."]
        )
    left, right = _digits(a), _digits(b)
    right += [0] * (len(left) - len(right))
    lines, borrow = [f"{a} - {b}"], 0
    for place in range(len(left)):
        top = left[place] - borrow
        minus = f"{left[place]} - {borrow} = {top}, " if place else ""
        need = int(top < right[place])
        lend = f"borrow 10, {top + 10} - {right[place]}" if need else f"{top} - {right[place]}"
        lines.append(f"{PLACES[place]}: {minus}{lend} = {top + 10 * need - right[place]}.")
        borrow = need
    return "\n".join([*lines, f"So the answer is **{a - b}**."])


def times_digit(number: int, digit: int) -> list[str]:
    """The lines of multiplying a number by one digit."""
    columns, lines, carry = _digits(number), [], 0
    for place, value in enumerate(columns):
        product = value * digit
        total = product + carry
        line = f"{PLACES[place]}: {value} * {digit} = {product}"
        if place:
            line += f", plus {carry} = {total}"
        if place < len(columns) - 1:
            line += f", write {total % 10}, carry {total // 10}"
        carry = total // 10
        lines.append(line + ".")
    return lines


def multiply_steps(a: int, b: int) -> str:
    """Multiply by one digit with carries; a product of two digits is said at once."""
    head, tail = f"{a} * {b}", f"So the answer is **{a * b}**."
    if a < 10 and b < 10:
        return f"{a} * {b} = {a * b}. {tail}"
    if a == 10 or b == 10:
        return f"{head}\nTimes 10 puts a 0 at the end of {a if b == 10 else b}.\n{tail}"
    big, small = max(a, b), min(a, b)
    if small < 10:
        return "\n".join([f"{big} * {small}", *times_digit(big, small), tail])
    tens, ones = small // 10 * 10, small % 10
    parts = [f"{big} * {small} = {big} * {tens} + {big} * {ones}"]
    if tens == 10:
        parts.append(f"{big} * 10 = {big * 10}.")
    else:
        parts.append(f"{big} * {tens}:")
        parts += times_digit(big, tens // 10)
        parts.append(f"{big} * {tens} = {big * tens}.")
    parts.append(f"{big} * {ones}:")
    parts += times_digit(big, ones)
    parts.append(f"{big} * {ones} = {big * ones}.")
    parts += add_steps(big * tens, big * ones).split("\n")[:-1]
    return "\n".join([*parts, tail])


def _operand(rng: random.Random) -> int:
    return rng.randint(0, 9) if rng.random() < 0.2 else rng.randint(10, 99)


def addition(rng: random.Random) -> Item:
    """Two numbers of up to three digits."""
    if rng.random() < 0.18:
        a, b = rng.randint(100, 999), rng.randint(1, 999)
        a, b = (b, a) if rng.random() < 0.5 else (a, b)
    else:
        a, b = _operand(rng), _operand(rng)
    in_words = max(a, b) <= 20 and rng.random() < 0.25
    question = ask(
        rng,
        (
            "(What is|What's|How much is|Calculate|Compute|Work out|Solve|Tell me|Can you "
            "calculate|) {a} (plus|+|plus|and|added to) {b}?",
            "(Add|Please add|Sum|Add up|Can you add) {a} and {b}.",
            "{a}(+| + |+ ){b}( =|=|=?|)",
            "(And|Now|What about|And what is|How about|Next:) {a} (+|plus) {b}?",
            "(What is|What's|Give me|Find) the sum of {a} and {b}?",
            "(I have|There are) {a} (apples|coins|books|eggs|cups) and (get|find|buy) {b} more. "
            "How many (is that|do I have)?",
            "(I have|She has|He has) {a} (apples|coins|books|euros) and {b} (more|more come). How "
            "many in total?",
        ),
        a=NUMBER_WORDS[a] if in_words else a,
        b=NUMBER_WORDS[b] if in_words else b,
    )
    return Item("addition", ("addition", *sorted((a, b))), question, add_steps(a, b))


def subtraction(rng: random.Random) -> Item:
    """A difference; sometimes negative."""
    if rng.random() < 0.15:
        a, b = rng.randint(100, 999), rng.randint(1, 999)
    else:
        a, b = _operand(rng), _operand(rng)
    if a < b and rng.random() < 0.8:
        a, b = b, a
    question = ask(
        rng,
        (
            "(What is|What's|How much is|Calculate|Compute|Work out|Solve|Tell me|) {a} (minus|-|"
            "less) {b}?",
            "(Subtract|Please subtract|Take) {b} from {a}.",
            "{a}(-| - |- ){b}( =|=|=?|)",
            "(And|Now|What about|And what is|How about|Next:) {a} (-|minus) {b}?",
            "(What is|What's|Find) the difference (between|of) {a} and {b}?",
            "(I have|There are) {a} (apples|coins|books|euros|eggs) and (lose|eat|sell|spend|give "
            "away) {b}. How many are left?",
            "Take {b} away from {a}.",
        ),
        a=a,
        b=b,
    )
    return Item("subtraction", ("subtraction", a, b), question, subtract_steps(a, b))


def multiplication(rng: random.Random) -> Item:
    """Tables, a number times one digit, and two-digit products in parts."""
    roll = rng.random()
    if roll < 0.42:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
    elif roll < 0.92:
        a, b = rng.randint(11, 99 if rng.random() < 0.85 else 999), rng.randint(2, 9)
    else:
        a, b = rng.randint(11, 99), rng.randint(11, 19 if rng.random() < 0.5 else 99)
    if rng.random() < 0.4:
        a, b = b, a
    question = ask(
        rng,
        (
            "(What is|What's|How much is|Calculate|Compute|Work out|Solve|Tell me|) {a} (times|*|"
            "x|multiplied by) {b}?",
            "(Multiply|Please multiply|Can you multiply) {a} (by|with|and) {b}.",
            "{a}(*| * |x| x |×){b}( =|=|=?|)",
            "(And|Now|What about|And what is|How about|Next:) {a} (times|*|x) {b}?",
            "(What is|What's|Find) the product of {a} and {b}?",
            "(I have|There are) {a} (boxes|bags|rows) with {b} (apples|eggs|coins|books) each. "
            "How many (is that|in total)?",
        ),
        a=a,
        b=b,
    )
    return Item(
        "multiplication", ("multiplication", *sorted((a, b))), question, multiply_steps(a, b)
    )


def division(rng: random.Random) -> Item:
    """Division by walking up the table, with a remainder where there is one."""
    b = rng.randint(2, 10)
    quotient = rng.randint(1, 10)
    rest = rng.randrange(b) if rng.random() < 0.55 else 0
    a = b * quotient + rest
    question = ask(
        rng,
        (
            "(What is|What's|How much is|Calculate|Compute|) {a} (divided by|/|:|over) {b}?",
            "(Divide|Please divide) {a} by {b}.",
            "{a}(/| / |:|÷){b}( =|=|)",
            "How (often|many times) does {b} go into {a}?",
        ),
        a=a,
        b=b,
    )
    steps = f"How many times does {b} go into {a}? "
    steps += ", ".join(f"{b} * {n} = {b * n}" for n in range(1, quotient + 1))
    remainder = f" remainder {rest}" if rest else ""
    left = f"{a} - {b * quotient} = {rest}."
    answer = f"{steps}. {left} So the answer is **{quotient}{remainder}**."
    return Item("division", ("division", a, b), question, answer)


UNITS = (
    ("kilometer", "meter", 1000, "km", "m"),
    ("meter", "centimeter", 100, "m", "cm"),
    ("meter", "millimeter", 1000, "m", "mm"),
    ("centimeter", "millimeter", 10, "cm", "mm"),
    ("kilogram", "gram", 1000, "kg", "g"),
    ("ton", "kilogram", 1000, "tons", "kg"),
    ("liter", "milliliter", 1000, "l", "ml"),
    ("gigabyte", "megabyte", 1000, "GB", "MB"),
    ("megabyte", "kilobyte", 1000, "MB", "KB"),
    ("terabyte", "gigabyte", 1000, "TB", "GB"),
    ("byte", "bit", 8, "bytes", "bits"),
    ("euro", "cent", 100, "euros", "cents"),
    ("hour", "minute", 60, "hours", "minutes"),
    ("minute", "second", 60, "min", "seconds"),
    ("week", "day", 7, "weeks", "days"),
    ("day", "hour", 24, "days", "hours"),
    ("year", "month", 12, "years", "months"),
    ("dozen", "piece", 12, "dozen", "pieces"),
    ("second", "millisecond", 1000, "s", "ms"),
    ("century", "year", 100, "centuries", "years"),
)


def _named(count: int, unit: str) -> str:
    plural = "centuries" if unit == "century" else unit + "s"
    return f"{count} {unit if count == 1 else plural}"


def unit(rng: random.Random) -> Item:
    """Convert to the smaller unit, or back where it comes out even."""
    large, small, factor, large_short, small_short = pick(rng, UNITS)
    count = rng.randint(2, 9) if factor in (12, 24) else rng.randint(1, 99 if factor > 60 else 30)
    back = rng.random() < 0.3
    if back and factor in (7, 8, 60):
        count = rng.randint(2, 10)
    elif rng.random() < 0.15 and factor not in (12, 24):
        count = 10 * rng.randint(1, 3 if factor < 60 else 9)
    big = _named(2, large).split()[1] if rng.random() < 0.7 else large_short
    little = _named(2, small).split()[1] if rng.random() < 0.7 else small_short
    amount, source, target = (count * factor, little, big) if back else (count, big, little)
    question = ask(
        rng,
        (
            "(How many|How much) {t} (are|is|are in|is in|make) {n} {s}?",
            "(Convert|Please convert|Change|Turn|Can you convert) {n} {s} (to|into|in) {t}.",
            "(What is|What's|How much is) {n} {s} in {t}?",
            "{n} {s} (in|to|into|as) {t}?",
            "(Express|Write|Give me) {n} {s} in {t}.",
            "(I have|It takes|It is) {n} {s}. How many {t} is that?",
        ),
        n=amount,
        s=source,
        t=target,
    )
    first = f"1 {large} is {factor} {small}s."
    zeros = f"{len(str(factor)) - 1} zero{'' if factor == 10 else 's'}"
    if back:
        work = (
            f"{count} * {factor} = {count * factor}."
            if factor in (7, 8, 12, 24, 60)
            else f"Take {zeros} away from {amount}: {count}."
        )
        result = _named(count, large)
    else:
        result = _named(count * factor, small)
        if factor in (7, 8) and count > 9:
            work = "\n".join([f"{count} * {factor}", *times_digit(count, factor)])
        elif factor in (12, 24):
            work = "\n".join([f"{factor} * {count}", *times_digit(factor, count)])
        elif factor == 60:
            steps = times_digit(count, 6)
            work = "\n".join([f"{count} * 6", *steps, "Put one 0 at the end."])
        elif factor in (7, 8):
            work = f"{count} * {factor} = {count * factor}."
        else:
            work = f"Put {zeros} at the end of {count}."
    answer = f"{first}\n{work}\nSo the answer is **{result}**."
    return Item("unit", ("unit", large, small, count, back), question, answer)


HARD = (
    "(What is|What's|Calculate|Compute|) {c} (+|-|*|plus|minus|times|/) {d}?",
    "(What is|What's|Calculate|Compute|) the (square root|cube root|logarithm|sine|factorial) of "
    "{a}?",
    "(What is|What's|Calculate|) {a} percent of {b}?",
    "(What is|What's|Calculate|) {a} (to the power of|squared plus|^|**|mod) {b}?",
    "(What is|What's|Calculate|) {a}.{b} (+|-|*|plus|times|/) {d}?",
    "(Solve|Can you solve) (x|2x|3x|y) (+|-) {a} = {b}(| for x).",
    "(What is|What's) {a} (+|plus) {b} (+|-|*|plus|minus) {e}?",
    "(Is|Tell me if) {a} (a prime number|prime)?",
)


def hard_sum(rng: random.Random) -> Item:
    """Arithmetic beyond the model, which it should say and not guess."""
    values = {
        "a": rng.randint(1, 99),
        "b": rng.randint(1, 99),
        "c": rng.randint(10_000, 10 ** rng.randint(5, 9)),
        "d": rng.randint(1000, 10 ** rng.randint(4, 9)),
        "e": rng.randint(1, 99),
    }
    question = ask(rng, HARD, **values)
    answer = (
        "Sorry, that is too hard for me. I add, subtract, multiply and divide two small whole "
        "numbers."
    )
    return Item("hard_sum", ("hard_sum", question.lower()), question, answer)


TASKS = {
    "hard_sum": (hard_sum, 1.2),
    "addition": (addition, 8.0),
    "subtraction": (subtraction, 9.0),
    "multiplication": (multiplication, 8.0),
    "division": (division, 6.0),
    "unit": (unit, 6.0),
}
