"""The project as a whole: imports point one way, the command line is instant, the wheel is complete, words are true."""

import argparse
import ast
import importlib
import re
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "modeling_llava"

# What each part may import, next to itself. `core` is the modules directly in the package.
BASE = {"core", "io", "text", "kernels"}
ALLOWED = {
    "io": set(),
    "text": {"io"},
    "kernels": set(),
    "core": {"io", "text", "kernels"},
    "data": BASE,
    "training": BASE | {"data"},
    "inference": BASE | {"data"},
    "endpoint": {"io"},
    "data_engine": BASE | {"data", "endpoint"},
    "tiny_world": BASE | {"data", "training", "inference", "endpoint", "data_engine", "evaluation"},
    "evaluation": BASE | {"data", "training", "inference", "endpoint", "data_engine"},
    "hub": BASE | {"data", "training", "inference", "conversion"},
    "conversion": BASE,
    "cli": BASE | {"data", "training", "inference", "endpoint", "data_engine", "tiny_world", "evaluation", "hub",
            "conversion"},
}  # fmt: skip
FREE = {"compat", "configuration_llava", "constants"}
"""Modules that everything may import, a leaf too."""


def modules():
    for folder, name in ((PACKAGE, None), (ROOT / "conversion", "conversion")):
        for path in sorted(folder.rglob("*.py")):
            relative = path.relative_to(folder)
            part = name or (relative.parts[0] if len(relative.parts) > 1 else "core")
            yield path, relative, part, name


def imported_names(path, relative, top):
    """Absolute dotted names of everything a file imports."""
    tree = ast.parse(path.read_text("utf-8"))
    package = ["modeling_llava", *([top] if top else []), *relative.parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def part_of(name):
    parts = name.split(".")
    if parts[0] != "modeling_llava" or len(parts) < 2:
        return None
    return parts[1] if parts[1] in ALLOWED else "core"


def test_imports_point_one_way():
    wrong = []
    for path, relative, part, top in modules():
        for name in imported_names(path, relative, top):
            target = part_of(name)
            if target is None or target == part or target in ALLOWED[part]:
                continue
            if target == "core" and name.split(".")[1] in FREE:
                continue
            wrong.append(f"{path.relative_to(ROOT)} ({part}) imports {name} ({target})")
    assert not wrong, "\n".join(wrong)


EXTENSION_INTERFACE = {  # methods and attributes that subclasses of Trainer and PreTrainedModel are meant to override or call
    "_get_train_sampler", "_get_eval_sampler", "_get_dataloader", "_save", "_save_optimizer_and_scheduler", "_save_rng_state",
    "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_best_model", "_push_from_checkpoint", "_init_weights",
    "_preprocess", "_expand_inputs_for_generation", "_merge_kwargs", "_get_num_multimodal_tokens", "_no_split_modules",
    "_tied_weights_keys", "_attn_implementation", "_asdict", "_replace", "_fields",
}  # fmt: skip


def test_private_names_of_other_packages_stand_in_compat():
    trees = {path: ast.parse(path.read_text("utf-8")) for path, *_ in modules()}
    ours = {
        name
        for tree in trees.values()
        for node in ast.walk(tree)
        for name in (
            [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) else
            [node.attr] if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") else
            [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []
        )
    }  # fmt: skip
    wrong = []
    for path, tree in trees.items():
        if path.name == "compat.py":
            continue
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.ImportFrom)
                and not node.level
                and not (node.module or "").startswith("modeling_llava")
            ):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
                names = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
            else:
                continue
            for name in names:
                private = isinstance(name, str) and name.startswith("_") and not name.startswith("__")
                if private and name not in ours | EXTENSION_INTERFACE:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
    assert not wrong, "\n".join(wrong)


def test_the_ignore_index_is_written_once():
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, *_ in modules()
        if path.name != "constants.py"
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and ast.unparse(node.operand) == "100"
    ]
    assert not wrong, "\n".join(wrong)


def test_help_imports_no_torch():
    program = Path(sys.executable).with_name("llava")
    if not program.is_file():
        pytest.skip("the console script is not installed in this environment")
    command = [sys.executable, "-X", "importtime", str(program), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "quickstart" in done.stdout
    assert not re.search(r"\| +(torch|transformers)$", done.stderr, re.M)


def test_every_command_has_help_that_says_what_it_does():
    from modeling_llava.cli.main import COMMANDS, build_parser

    def commands_of(parser):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from action.choices.items()

    def look(name, command):
        assert len(command.description) > 20, name
        if module := getattr(command, "module", None):  # read when its arguments are
            command.module = None
            importlib.import_module(module).add_arguments(command)
        undocumented = [
            option.dest
            for option in command._actions
            if option.help is None and not isinstance(option, argparse._SubParsersAction)
        ]
        assert not undocumented, (name, undocumented)
        for child, parser in commands_of(command):
            look(f"{name} {child}", parser)

    for name in COMMANDS:
        look(name, dict(commands_of(build_parser(name)))[name])


def test_nothing_names_a_place_of_one_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    # put together here, so that this file does not name them itself
    places = ["/" + "work/", "/" + "root/", "/" + "farm/", "." + "library/", "/tmp/" + "w/"]
    wrong = []
    for name in tracked.stdout.splitlines():
        path = ROOT / name
        if "golden" in path.parts or not path.is_file() or path.stat().st_size > 2**20:
            continue
        text = path.read_text("utf-8", errors="ignore")
        wrong += [f"{name}: {place}" for place in places if place in text]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_the_wheel_alone_works_in_an_empty_folder(tmp_path):
    """Built, installed next to nothing of the checkout, run from a folder without it; dependencies are this machine's."""
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path / "dist"), str(source)], check=True)
    wheel = next((tmp_path / "dist").glob("*.whl"))
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    here = next(path for path in sys.path if path.endswith("site-packages"))
    # its packages, after the wheel's own; without this checkout's editable install
    Path(site, "dependencies.pth").write_text(here + "\n")
    empty = tmp_path / "empty"
    empty.mkdir()

    def run(*command):
        return subprocess.run(command, cwd=empty, check=True, capture_output=True, text=True).stdout

    assert "quickstart" in run(python.with_name("llava"), "--help")
    program = (
        "import modeling_llava, modeling_llava.conversion, modeling_llava.data, modeling_llava.training;"
        "from modeling_llava.processing_llava import load_chat_template;"
        "from modeling_llava.conversion import convert_original_to_hf;"
        "assert 'ASSISTANT' in load_chat_template('vicuna_v1');"
        "print(modeling_llava.__file__, modeling_llava.conversion.__file__)"
    )
    places = run(python, "-c", program).split()
    assert all(str(tmp_path / "env") in place for place in places), places
    files = ZipFile(wheel).namelist()
    for needed in ("text/templates/vicuna_v1.jinja", "hub/model_card_template.md", "presets/qlora.yaml", "py.typed"):
        assert f"modeling_llava/{needed}" in files, needed
    assert not any(name.startswith("tests/") for name in files)
