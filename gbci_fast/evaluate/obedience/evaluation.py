"""Obedience: whether what is told of a lesion is painted. One attribute is told differently, at one seed."""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from gbci_fast.attributes import Attributes
from gbci_fast.errors import GBCIError
from gbci_fast.evaluate.case import variant_seed
from gbci_fast.evaluate.lesions import LesionCase, OnProgress
from gbci_fast.evaluate.metrics import first_with_interval, patient_draws
from gbci_fast.evaluate.obedience.measures import BLOB, MEASURED, MEASURES, measure
from gbci_fast.evaluate.obedience.shares import RealClasses, mean, told_auc
from gbci_fast.evaluate.obedience.switches import CONTROL, MASS, OWN, SWITCHES, TELLINGS, Switch
from gbci_fast.evaluate.painting import Description
from gbci_fast.evaluate.report import target
from gbci_fast.evaluate.settings import ObedienceSettings
from gbci_fast.evaluate.utility.patches import moved_lesions

FEWEST = 10  # real lesions of a class, for a difference between classes
CONTROL_BOUND = 0.1  # of a seed's change
KEPT_BOUND = 1.0  # place and size may change as much as from one seed to another
CHANCE = 0.5
NO_SHARE = ("value", "low", "high")  # of a difference that is not shown to be one

Painter = Callable[[Sequence[LesionCase], Sequence[Description]], Sequence[np.ndarray]]
"""``f(cases, descriptions)``: float32 [S, S] in [0, 1], one per case; `LesionCase.seed` decides the noise."""


class Judge(Protocol):
    """What reads attributes off images; see `gbci_fast.evaluate.readers.Readers`."""

    tasks: tuple[str, ...]

    def read(self, cases: Sequence[LesionCase], images: Sequence[np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """{task: score of the positive answer, float64 [N]}."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Real:
    """Real lesions, what is measured on them, and how often they count in the resamples.

    Attributes:
        cases: N lesions.
        values: {name: float64 [N]}: measures, or readings by task.
        weights: float64 [R, N].
    """

    cases: Sequence[LesionCase]
    values: Mapping[str, np.ndarray]
    weights: np.ndarray

    def classes(self, switch: Switch) -> tuple[RealClasses, np.ndarray] | None:
        """The two classes of a switch and the rows of their lesions; None with fewer than `FEWEST` in a class.

        A data set with lesions of one class alone is left out: it tells the classes apart by what sets the data set
        apart.
        """
        answers = [switch.real(case.attributes) for case in self.cases]
        told: dict[str, set[bool | None]] = {}
        for case, answer in zip(self.cases, answers, strict=True):
            told.setdefault(case.root, set()).add(answer)
        both = {root for root, known in told.items() if {True, False} <= known}
        rows = np.array([i for i, a in enumerate(answers) if a is not None and self.cases[i].root in both], int)
        ones = np.array([answers[i] for i in rows], bool)
        if min(ones.sum(), (~ones).sum()) < FEWEST:
            return None
        diameters = np.array([self.cases[i].diameter for i in rows])
        return RealClasses(ones, diameters, [self.cases[i].root for i in rows], self.weights[:, rows]), rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Painted:
    """V paintings of N lesions by one telling.

    Attributes:
        pixels: [V][N], the masked pixels, float32.
        values: {name: float64 [V, N]}: measures and readings.
    """

    pixels: Sequence[Sequence[np.ndarray]]
    values: Mapping[str, np.ndarray]


def choose(cases: Sequence[LesionCase], count: int, seed: int) -> list[LesionCase]:
    """`count` masses of as many patients as there are, in random order; all masses if there are fewer.

    Raises:
        GBCIError: there is no mass, or there are masses of only one patient.
    """
    order = np.random.default_rng(seed).permutation(len(cases))
    masses = [cases[i] for i in order if cases[i].attributes.finding_categories == MASS]
    if len({case.patient for case in masses}) < 2:
        raise GBCIError(f"of {len(cases)} lesions {len(masses)} are masses; expected masses of two patients or more")
    turns: Counter[str] = Counter()
    ranked = []
    for i, case in enumerate(masses):
        ranked.append((turns[case.patient], i))
        turns[case.patient] += 1
    return [masses[i] for _, i in sorted(ranked)[:count]]


def evaluate_obedience(
    cases: Sequence[LesionCase],
    painter: Painter,
    judge: Judge,
    settings: ObedienceSettings,
    *,
    yardstick: Sequence[LesionCase] | None = None,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """What changes in painted lesions when one attribute is told differently, at one seed; see `SWITCHES`.

    Masses out of `cases` are painted by every telling, at the same seeds. For a switch the report has:

    - ``reading``: whether the judge reads what was told: AUC over paintings told 1 and told 0, share of the pairs at
      one seed with the higher reading told 1, and the shift of the mean as a share of the difference between real
      classes (None where it is not shown to be one). Null: the AUC over paintings with and without the control's word.
    - ``measures``: shift of every measure as a share of the difference between real classes. The share is given where
      real lesions of the two classes differ in the measure. Nulls: the same share for the control, and the mean
      difference between two seeds.
    - ``change``: root mean square change of the masked pixels, as a share of the change between two seeds.
    - ``place``: how far the bright blob moves (pixels) and grows or shrinks (|ln| of the ratio of diameters), beside
      the same between two seeds.

    Real classes are compared at equal size and within data sets (`RealClasses`).

    Args:
        cases: real lesions, which the judge reads, and out of which masses are painted.
        painter: called once per telling and seed.
        judge: of its admitted tasks.
        settings: of the evaluation.
        yardstick: real lesions between whose classes the measures are compared; None = `cases`.
        on_progress: called as ``f("reading attributes", done, total)``.

    Returns:
        The report's ``lesions``, ``patients``, ``paintings``, ``real``, ``switches`` and ``targets``, as JSON values.

    Raises:
        GBCIError: see `choose`.
    """
    chosen = choose(cases, settings.lesions, settings.seed)
    yardstick = [*(cases if yardstick is None else yardstick)]
    normal = _normal_places(yardstick, settings.seed)
    yardstick += normal
    groups = (chosen, cases, yardstick)
    drawn = patient_draws([case.patient for group in groups for case in group], settings.seed).astype(np.float64)
    weights, own_weights, yard_weights = np.split(drawn, np.cumsum([len(group) for group in groups])[:-1], axis=1)

    own = _by_name(measure(cases))
    if any(switch.task in judge.tasks for switch in SWITCHES):
        own |= judge.read(cases)
    scale = _by_name(measure(yardstick))
    analysis = _Analysis(
        chosen=chosen,
        weights=weights,
        own=Real(cases=cases, values=own, weights=own_weights),
        yardstick=Real(cases=yardstick, values=scale, weights=yard_weights),
        painted=_paint(chosen, painter, judge, settings.seeds, on_progress),
        tasks=judge.tasks,
    )
    switches = {switch.name: analysis.report(switch) for switch in SWITCHES}
    return {
        "lesions": len(chosen),
        "patients": len({case.patient for case in chosen}),
        "paintings": len(chosen) * settings.seeds * len(TELLINGS),
        "real": {"lesions": len(cases), "yardstick": len(yardstick) - len(normal), "normal": len(normal)},
        "switches": switches,
        "targets": build_targets(switches),
    }


def _normal_places(cases: Sequence[LesionCase], seed: int) -> list[LesionCase]:
    """Places without a lesion, as cases of "No Finding" and no other attribute: masks moved into normal tissue."""
    try:
        moved = moved_lesions(cases, len(cases), seed)
    except GBCIError:  # no room: then "no finding" has no real class
        return []
    return [replace(case, attributes=Attributes(finding_categories=())) for case in moved]


def _paint(
    chosen: Sequence[LesionCase], painter: Painter, judge: Judge, variants: int, on_progress: OnProgress
) -> dict[str, Painted]:
    """The paintings of every telling; those of switches that the judge knows, and the control's, are read."""
    tasks = [task for task in judge.tasks if any(switch.task == task for switch in SWITCHES)]
    read = {telling for switch in SWITCHES if switch.task in tasks for telling in switch.tellings} | {OWN, CONTROL}
    done, painted = 0, {}
    for telling, tell in TELLINGS.items():
        pixels, measured, readings = [], [], []
        for variant in range(variants):
            at = [replace(case, seed=variant_seed(case.seed, variant)) for case in chosen]
            images = painter(at, [tell(case) for case in at])
            pixels.append([image[case.mask] for image, case in zip(images, at, strict=True)])
            measured.append(measure(at, images))
            if tasks and telling in read:
                readings.append(judge.read(at, images))
                done += 1
                on_progress("reading attributes", done * len(chosen), variants * len(read) * len(chosen))
        values = _by_name(np.array(measured))
        values |= {task: np.array([found[task] for found in readings]) for task in tasks if readings}
        painted[telling] = Painted(pixels=pixels, values=values)
    return painted


@dataclass(frozen=True, kw_only=True, eq=False)
class _Analysis:
    """All that is known of real and painted lesions, and the report of a switch.

    Attributes:
        chosen, weights: the painted lesions, N, and float64 [R, N].
        own: the lesions that the judge reads; with measures, too.
        yardstick: the lesions between whose classes measures are compared.
        painted: by telling.
        tasks: of the judge.
    """

    chosen: Sequence[LesionCase]
    weights: np.ndarray
    own: Real
    yardstick: Real
    painted: Mapping[str, Painted]
    tasks: Sequence[str]

    def report(self, switch: Switch) -> dict[str, Any]:
        """The report's entry of a switch."""
        rows = np.arange(len(self.chosen))
        roots = np.array([case.root for case in self.chosen])
        found = {
            "told": list(switch.tellings),
            "reading": self._reading(switch),
            "measures": self._measures(switch),
            "change": self._change(switch, rows),
            "place": self._place(switch),
        }
        if len(set(roots)) > 1:
            apart = {root: np.flatnonzero(roots == root) for root in dict.fromkeys(roots.tolist())}
            found["roots"] = {
                root: {"lesions": len(rows), "change": self._change(switch, rows)} for root, rows in apart.items()
            }
        return found

    def _pair(self, switch: Switch, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Values told 0 and told 1, [V, N] each."""
        zero, one = (self.painted[telling].values[name] for telling in switch.tellings)
        return zero, one

    def _reading(self, switch: Switch) -> dict[str, Any]:
        task = switch.task
        if task is None or task not in self.tasks:
            why = "no reader knows this attribute" if task is None else f"no reader of {task} is admitted"
            return {"task": task, "judged": False, "reason": why}
        if (classes := self.own.classes(switch)) is None:
            return {"task": task, "judged": False, "reason": f"fewer than {FEWEST} real lesions of a class"}
        real, rows = classes
        known = self.own.values[task][rows]
        difference = real.difference(known)
        zero, one = self._pair(switch, task)
        plain, control = (self.painted[telling].values[task] for telling in (OWN, CONTROL))
        higher = ((one > zero) + 0.5 * (one == zero)).mean(0)
        shown = _excludes(first_with_interval(difference), 0)

        def share(shift: np.ndarray) -> dict[str, float | None]:
            return _ratio(mean(shift.mean(0), self.weights), difference) if shown else dict.fromkeys(NO_SHARE)

        return {
            "task": task,
            "judged": True,
            "reason": "",
            "real": _counts(real),
            "real_auc": first_with_interval(real.auc(known)),
            "real_difference": first_with_interval(difference),
            "auc": first_with_interval(told_auc(zero, one, self.weights)),
            "higher": first_with_interval(mean(higher, self.weights)),
            "share": share(one - zero),
            "null_auc": first_with_interval(told_auc(plain, control, self.weights)),
            "null_share": share(control - plain),
        }

    def _measures(self, switch: Switch) -> dict[str, Any]:
        scale, here = self.yardstick.classes(switch), self.own.classes(switch)
        return {name: self._measure(switch, name, scale, here) for name in MEASURES}

    def _measure(
        self,
        switch: Switch,
        name: str,
        scale: tuple[RealClasses, np.ndarray] | None,
        here: tuple[RealClasses, np.ndarray] | None,
    ) -> dict[str, Any]:
        shift = mean(_over_seeds(np.subtract(*reversed(self._pair(switch, name)))), self.weights)
        found: dict[str, Any] = {"shift": first_with_interval(shift), "used": False, "reason": "", "share": None}
        if here is not None:
            found["real_auc_here"] = first_with_interval(here[0].auc(self.own.values[name][here[1]]))
        if scale is None:
            return found | {"reason": f"fewer than {FEWEST} real lesions of a class"}
        real, rows = scale
        known = self.yardstick.values[name][rows]
        auc, difference = real.auc(known), real.difference(known)
        found |= {"real": _counts(real), "real_auc": first_with_interval(auc)}
        found["real_difference"] = first_with_interval(difference)
        if not (_excludes(found["real_auc"], CHANCE) and _excludes(found["real_difference"], 0)):
            return found | {"reason": "real lesions of the two classes are not shown to differ"}
        plain, control = (self.painted[telling].values[name] for telling in (OWN, CONTROL))
        seeds = mean(_over_seeds(self._between_seeds(lambda v, w: np.abs(plain[v] - plain[w]))), self.weights)
        return found | {
            "used": True,
            "share": _ratio(shift, difference),
            "null_share": _ratio(mean(_over_seeds(control - plain), self.weights), difference),
            "seed_share": _ratio(seeds, np.abs(difference)),
        }

    def _change(self, switch: Switch, rows: np.ndarray) -> dict[str, float | None]:
        zero, one = (self.painted[telling].pixels for telling in switch.tellings)
        squares = np.array(
            [[_mean_square(a, b) for a, b in zip(*pair, strict=True)] for pair in zip(zero, one, strict=True)]
        )
        weights = self.weights[:, rows]
        return _ratio(mean(np.sqrt(squares.mean(0))[rows], weights), mean(self._seed_change[rows], weights))

    @cached_property
    def _seed_change(self) -> np.ndarray:
        """The root mean square change of every lesion between two seeds by its own description, [N]."""
        plain = self.painted[OWN].pixels
        squares = self._between_seeds(
            lambda v, w: np.array([_mean_square(a, b) for a, b in zip(plain[v], plain[w], strict=True)])
        )
        return np.sqrt(squares.mean(0))

    def _between_seeds(self, difference: Callable[[int, int], np.ndarray]) -> np.ndarray:
        """``difference(v, w)``, [N], for all pairs of seeds: [pairs, N]."""
        variants = range(len(self.painted[OWN].pixels))
        return np.array([difference(v, w) for v, w in itertools.combinations(variants, 2)])

    def _place(self, switch: Switch) -> dict[str, Any]:
        zero, one = (self.painted[telling].values for telling in switch.tellings)
        plain = self.painted[OWN].values
        moved = np.hypot(one["row"] - zero["row"], one["column"] - zero["column"])
        resized = np.abs(np.log(one["diameter"] / zero["diameter"]))
        by_seed = self._between_seeds(
            lambda v, w: np.hypot(*(plain[name][v] - plain[name][w] for name in ("row", "column")))
        )
        resized_by_seed = self._between_seeds(lambda v, w: np.abs(np.log(plain["diameter"][v] / plain["diameter"][w])))
        each = [mean(_over_seeds(part), self.weights) for part in (moved, by_seed, resized, resized_by_seed)]
        names = ("moved", "moved_by_seed", "resized", "resized_by_seed")
        return {name: first_with_interval(values) for name, values in zip(names, each, strict=True)} | {
            "keeps": switch.keeps,
            "moved_share": _ratio(each[0], each[1]),
            "resized_share": _ratio(each[2], each[3]),
            "faint": [float(np.isnan(values[BLOB[0]]).mean()) for values in (zero, one)],
        }


def build_targets(switches: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The control's change, and the largest change of place and size over the switches that should keep them."""
    change = switches[CONTROL]["change"]["value"]
    note = "" if change is not None else "two seeds give the same painting"
    name = "obedience, control: change by a meaningless word, as a share of a seed's"
    targets = [target(name, change, CONTROL_BOUND, at_least=False, note=note)]
    for what, key in (("place", "moved_share"), ("size", "resized_share")):
        shares = {name: found["place"][key]["value"] for name, found in switches.items() if found["place"]["keeps"]}
        known = {name: share for name, share in shares.items() if share is not None}
        worst = max(known, key=lambda name: known[name], default=None)
        value = None if worst is None else known[worst]
        note = "no lesion is bright enough to have a place" if worst is None else f"largest for {worst}"
        name = f"obedience, {what} kept: change by a switch, as a share of a seed's"
        targets.append(target(name, value, KEPT_BOUND, at_least=False, note=note))
    return targets


def _by_name(measured: np.ndarray) -> dict[str, np.ndarray]:
    """{name: [...]} of what `measure` returns, [..., len(MEASURED)]."""
    return {name: measured[..., i] for i, name in enumerate(MEASURED)}


def _over_seeds(values: np.ndarray) -> np.ndarray:
    """The mean of [V, N] over the first axis without NaN, [N]; NaN where all are."""
    known = ~np.isnan(values)
    count = known.sum(0)
    return np.where(count > 0, np.where(known, values, 0).sum(0) / np.maximum(count, 1), np.nan)


def _ratio(shift: np.ndarray, difference: np.ndarray) -> dict[str, float | None]:
    """The summary of a quotient of two bootstrapped values, [R] each."""
    with np.errstate(invalid="ignore", divide="ignore"):
        share = shift / difference
    return first_with_interval(np.where(np.isfinite(share), share, np.nan))


def _mean_square(one: np.ndarray, other: np.ndarray) -> float:
    return float(((one.astype(np.float64) - other) ** 2).mean())


def _excludes(summary: Mapping[str, float | None], value: float) -> bool:
    low, high = summary["low"], summary["high"]
    return low is not None and high is not None and not low <= value <= high


def _counts(real: RealClasses) -> dict[str, int]:
    return {"ones": int(real.ones.sum()), "zeros": int((~real.ones).sum())}
