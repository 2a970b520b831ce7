"""What an evaluation says, in plain words."""

from __future__ import annotations

from convfusion.evaluate.drawing import STUDENT, TEACHER
from convfusion.evaluate.images import mean_of_psnr
from convfusion.evaluate.measure import NEIGHBOURS, Distribution
from convfusion.evaluate.motion import Motion, ratio_of_means
from convfusion.evaluate.results import Evaluation
from convfusion.evaluate.scores import Mean


def give_verdict(evaluation: Evaluation) -> str:
    """The two answers that numbers of this kind can give, in plain sentences: of pairs, of sets."""
    samples = evaluation.samples
    prompts = [sample.prompt for sample in samples]
    student = mean_of_psnr([sample.student.psnr for sample in samples], prompts)
    other_seed = mean_of_psnr([sample.other_seed.psnr for sample in samples], prompts)
    noun = evaluation.noun
    alike = f"From the same noise the student draws the same {noun} as the teacher"
    if student.value is not None:
        alike = (
            f"From the same noise, the student’s {noun} have a PSNR of "
            f"{format_mean(student, '.1f')} dB against the teacher’s (higher is closer)"
        )
    other = (
        "equal ones, too" if other_seed.value is None else f"{format_mean(other_seed, '.1f')} dB"
    )
    return (
        f"{alike}; the teacher’s own {noun} from different noises have {other}. "
        + (f"{compare_motion(evaluation.motion, prompts)} " if evaluation.motion else "")
        + compare_with_chance(evaluation.distributions[0], evaluation.settings["prompts"], noun)
    )


def compare_motion(motion: Motion, prompts: list[str]) -> str:
    """How much the student's clips flicker and change beside the teacher's, in a sentence."""
    told = []
    for word, values in (("flicker", motion.flicker), ("change", motion.change)):
        ratio = ratio_of_means(values[STUDENT], values[TEACHER], prompts)
        if ratio.value is not None:
            told.append(f"{word} {format_ratio(ratio)} times as much")
    if not told:
        return "The teacher’s clips do not change from frame to frame."
    return f"Its clips {' and '.join(told)} from frame to frame as the teacher’s."


def compare_with_chance(student: Distribution, prompts: int, noun: str = "pictures") -> str:
    """Whether the student's set is further from the teacher's than chance has it."""
    excess, error = student.kid_excess, student.kid_excess_error
    if excess is None or error is None or prompts <= NEIGHBOURS:
        return (
            f"{student.samples} {noun} of {prompts} prompts are too few to compare student and "
            "teacher as sets."
        )
    if abs(excess) > 2 * error:
        answer = (
            f"As a set, the student’s {noun} are {'further from' if excess > 0 else 'nearer to'} "
            "the teacher’s than the teacher’s own from other noises are, by more than chance"
        )
    else:
        answer = (
            f"As a set, the student’s {noun} are no further from the teacher’s than the teacher’s "
            f"own from other noises are, as far as {student.samples} {noun} can tell: a "
            f"difference of less than {_round(2e3 * error)} would not show"
        )
    return (
        f"{answer} (the kernel distances ×10³ differ by {format_thousandths(excess, error)}; up to "
        "two standard errors is chance)."
    )


def format_mean(mean: Mean, form: str) -> str:
    """A mean with its standard error; `equal` of a PSNR of equal pictures."""
    if mean.value is None:
        return "equal"
    return f"{mean.value:{form}}" + ("" if mean.error is None else f" ± {mean.error:{form}}")


def format_ratio(ratio: Mean) -> str:
    """A ratio with its standard error, with a third digit where that is below 0.005."""
    exact = ratio.error is not None and ratio.error < 0.005
    return "–" if ratio.value is None else format_mean(ratio, ".3f" if exact else ".2f")


def format_thousandths(value: float, error: float | None) -> str:
    """1000 times a value and its standard error, to as many digits as the error has."""
    if error is None:
        return f"{1e3 * value:.0f}".replace("-", "−")
    digits = _count_digits(1e3 * error)
    return f"{1e3 * value:.{digits}f} ± {1e3 * error:.{digits}f}".replace("-", "−")


def _round(value: float) -> str:
    return f"{value:.{_count_digits(value)}f}"


def _count_digits(value: float) -> int:
    """Behind the point, for two significant ones of a number, three at most."""
    return 0 if value >= 10 else 1 if value >= 1 else 2 if value >= 0.1 else 3
