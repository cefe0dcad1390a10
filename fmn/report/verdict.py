"""The verdict of a report in words: how good its model is, and what to try if others are better."""

from collections.abc import Mapping, Sequence

from fmn.evaluate.bootstrap import Difference
from fmn.report.results import AVERAGE, EXPERT, MACRO, Estimate, Report, Table
from fmn.report.wording import listed, points, shown

JUDGEMENTS = ("better", "worse", "within chance")
SIGNIFICANT = 0.05  # a difference with a smaller p-value is not within chance
ENOUGH = 0.9  # a task that keeps less of its expert's score is named, with a remedy
LARGER = 1.05  # a better model with more than so many times the parameters is an alternative


def judgement(difference: Difference) -> str:
    """Whether the first model of a difference is better or worse: one of JUDGEMENTS."""
    if difference.difference is None or difference.p_value >= SIGNIFICANT:
        return JUDGEMENTS[2]
    return JUDGEMENTS[(difference.difference > 0) != difference.higher_is_better]


def verdict(report: Report) -> list[str]:
    """The verdict on the model that a report is about, in sentences.

    They state how much of the experts' scores it keeps; for each other model, the result of the
    paired test of their mean scores (for `base` only if the model is not better); the tasks that
    keep least; and what to try if another model is better or a task keeps less than ENOUGH.
    """
    table, head = report.table, report.table.headline
    row = table.rows[-1]
    tested = {
        name: by_row[row]
        for name, by_row in table.differences.items()
        if name != EXPERT and row in by_row and by_row[row].difference is not None
    }
    worse_than = [name for name in tested if judgement(tested[name]) == "worse"]
    size = report.sizes.get(head)
    offers = [name for name in worse_than if size and report.sizes.get(name, 0) > LARGER * size]
    rivals = {
        name: difference
        for name, difference in tested.items()
        if name not in offers and (name != "base" or judgement(difference) != "better")
    }
    lines = [_keeps(report, [*rivals.keys() & worse_than]), *_against(rivals), *_least(table)]
    if better := [name for name in worse_than if name in rivals]:
        best = max(better, key=lambda name: abs(tested[name].difference or 0.0))
        instead = _instead(report, best)
        if best == AVERAGE:
            lines.append(f"{instead[0].upper()}{instead[1:]} to have the average.")
        else:
            lines.append(f"{best} does better here: {instead}.")
    lines += [_offer(report, name) for name in offers]
    if losing := _losing(table):
        lines += _remedy(report, losing)
    return lines


def _keeps(report: Report, worse_than: Sequence[str]) -> str:
    """The share that the model keeps, its rank among the others, and the plain average's share."""
    table, head, row = report.table, report.table.headline, report.table.rows[-1]
    score, share = table.columns[head][row]
    share = share if share and share.value is not None else None
    number = share or score
    tasks = [name for name in table.tasks if table.columns[head][name].share or not share]
    over = f"mean of {len(tasks) if share else len(table.averaged)} tasks" if row == MACRO else row
    interval = f", 95 % interval {number.span}" if number.span else ""
    verb, unit = ("keeps", " of the experts' scores") if share else ("scores", "")
    what = f"{verb} {number.with_unit}{unit} ({over}{interval})"
    average = _number(table, AVERAGE)
    if AVERAGE in worse_than and average:
        plain = f"The plain average does better here: it {verb} {average.with_unit}{unit}"
        return f"{plain}; the model {head} {what}."
    place = _place(table)
    other = f"; the plain average would {verb[:-1]} {average.with_unit}" if average else ""
    return f"The model {head} {what}{place}{other if head != AVERAGE else ''}."


def _number(table: Table, name: str) -> Estimate | None:
    """A column's share in the last row; without experts, its score."""
    entry = table.columns[name].get(table.rows[-1]) if name in table.columns else None
    return (entry.share or entry.score) if entry else None


def _place(table: Table) -> str:
    """Whether the headline is the best of the merged models."""
    names = [name for name in table.columns if name not in ("base", EXPERT)]
    numbers = {name: number for name in names if (number := _number(table, name))}
    values = {name: each.value for name, each in numbers.items() if each.value is not None}
    if len(values) < 2 or table.headline not in values:
        return ""
    sign = 1 if numbers[table.headline].is_percent else -1
    best = max(values, key=lambda name: sign * values[name])
    if values[best] == values[table.headline]:
        return f", the best of {len(values)} models"
    return f"; of {len(values)} models, {best} is the best with {numbers[best].with_unit}"


def _against(tested: Mapping[str, Difference]) -> list[str]:
    """The models that it beats, those within chance, and those that beat it."""
    lines = []
    for word, start in (
        ("better", "Better than"),
        ("within chance", "Not better, beyond chance, than"),
        ("worse", "Worse than"),
    ):
        parts = []
        for name, difference in tested.items():
            value, is_percent = difference.difference or 0.0, difference.higher_is_better
            unit = " points" * is_percent
            if judgement(difference) == word == "within chance":
                parts.append(f"{name} ({points(value, is_percent)}{unit})")
            elif judgement(difference) == word:
                parts.append(f"{name} by {shown(abs(value), is_percent)}{unit}")
        lines += [f"{start} {listed(parts)}."] if parts else []
    return lines


def _shares(table: Table) -> dict[str, float]:
    """The share that each task keeps, without tasks whose expert is no better than guessing."""
    entries = {name: table.columns[table.headline][name] for name in table.tasks}
    return {
        name: entry.share.value
        for name, entry in entries.items()
        if name not in table.guessing and entry.share and entry.share.value is not None
    }


def _losing(table: Table) -> list[str]:
    """The tasks that keep less than ENOUGH, the least first."""
    shares = _shares(table)
    return sorted((name for name in shares if shares[name] < ENOUGH), key=shares.__getitem__)


def _least(table: Table) -> list[str]:
    """A sentence about the tasks that lose most."""
    shares, losing = _shares(table), _losing(table)
    if len(shares) < 2:
        return []
    if losing:
        return [f"Least is kept of {listed([f'{n} ({shown(shares[n])} %)' for n in losing[:3]])}."]
    last = min(shares, key=shares.__getitem__)
    return [f"Every task keeps at least {shown(shares[last])} % ({last})."]


def _instead(report: Report, name: str) -> str:
    """The settings that make another model of the report the run's model."""
    recipe, other = report.recipes.get(report.table.headline), report.recipes.get(name)
    if recipe and other:
        steps = {"calibrate": "`calibrate: null`", "realign": "`realign: {}`"}
        plain = dict.fromkeys(steps)
        if recipe.model_copy(update=plain) == other.model_copy(update=plain):
            later = [steps[n] for n in steps if getattr(recipe, n) and not getattr(other, n)]
            if later:
                return f"leave out what follows it, {listed(later)}"
            return f"put {name} first under `realign`"
    if name == AVERAGE:
        return "try `merge: {method: average}`"
    return f"try the settings of {name} under `merge`"


def _offer(report: Report, name: str) -> str:
    """A sentence about a larger model: its share, its parameters, and how to get it."""
    table, sizes = report.table, report.sizes
    share = table.columns[name][table.rows[-1]].share
    keeps = f"keeps {share.with_unit}" if share else "scores more"
    before, after = sizes[table.headline], sizes[name]
    cost = f"with the parameters of {after:.2f} encoders instead of {before:.2f}"
    return f"{name} {keeps} {cost}; put it first under `realign` to have it."


def _remedy(report: Report, losing: Sequence[str]) -> list[str]:
    """Sentences about models that keep more of these tasks, and about what else to try."""
    table, lines = report.table, []
    for task in losing:
        more = {
            name: share.value or 0.0
            for name, by_row in table.differences.items()
            if name != EXPERT and task in by_row and judgement(by_row[task]) == "worse"
            if (share := table.columns[name][task].share)
        }
        if more:
            best = max(more, key=more.__getitem__)
            lines.append(f"{best} keeps more of {task} ({shown(more[best])} %).")
    recipe = report.recipes.get(table.headline)
    of_kinds = {name: table.definitions[name] for name in losing}
    uncalibrated = [n for n, task in of_kinds.items() if task.task == "text-generation"]
    if recipe and uncalibrated and not recipe.calibrate:
        lines.append(f"For {listed(uncalibrated[:3])}, try `calibrate: {{}}`.")
    headed = [name for name, task in of_kinds.items() if task.kind.has_head]
    tasks = listed(headed[:3])
    if not headed:
        return lines
    if recipe and not recipe.realign:
        lines.append(f"For {tasks}, try re-aligned heads: `realign: {{realigned: {{}}}}`.")
    elif recipe:
        tried = [other.realign.own_layers for other in report.recipes.values() if other.realign]
        method = "" if recipe.auto else "`merge: {method: auto}` or "
        lines.append(f"For {tasks}, try {method}`own_layers: {max(tried) + 1}` under `realign`.")
    return lines
