"""Problems in the form of ScienceQA's `problems.json`, and the command that all benchmarks have."""

from modeling_llava.cli.main import main
from modeling_llava.evaluation.scienceqa import read_problems


def science_problem(number, split="test", **changes):
    """Answer, subject, hint, image and grade go through their values at different paces."""
    problem = {
        "question": f"Which is number {number}?",
        "choices": ["one", "two", "three"][: 2 + number % 2],
        "answer": number % 2,
        "hint": f"There are {number} of them." if number % 3 else "",
        "image": "image.png" if number % 2 else None,
        "task": "closed choice",
        "grade": f"grade{1 + number % 12}",
        "subject": ["natural science", "social science", "language science"][number % 3],
        "topic": "numbers",
        "category": "counting",
        "skill": "count",
        "lecture": "Counting starts at one.\nIt goes on." if number % 2 else "",
        "solution": f"Count to {number}.",
        "split": split,
    }
    return {**problem, **changes}


def problems_of(science, split="test"):
    return read_problems(science / "problems.json", science / "pid_splits.json", split, science / "images")


def llava_eval(benchmark, model, out, *options):
    """The status of `llava eval BENCHMARK MODEL`, on the CPU."""
    options = ["--out", out, "--dtype", "float32", "--device", "cpu", *options]
    return main(["eval", benchmark, str(model), *map(str, options)])
