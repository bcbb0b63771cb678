"""Every command that the documents name: run, or checked as far as it can be and listed here with the reason."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import cases
from benchmarks.run import parse
from fastalex import _native
from fastalex.train import Options
from fastalex.train.__main__ import parser as train_parser
from fastalex.train.build import make_model
from fastalex.train.data import DEFAULTS
from fastalex.train.options import given as given_options
from tests.support import tutorial
from tests.support.packaging import ROOT, run

DOCUMENTS = ("README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")))
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_WORDS = r"(?:[A-Z_]+=\S+ )*(?:make|python|pytest|pip|torchrun|git) [^`\n]+"


def commands_of(document: str) -> list[str]:
    """From shell blocks, from indented blocks, and from words in code type that start as a command does."""
    text = (ROOT / document).read_text()
    blocks = "".join(body for language, body in _FENCED.findall(text) if language == "sh")
    prose = _FENCED.sub("", text)
    found = [line for line in blocks.splitlines() if line and not line.startswith("#")]
    found += re.findall(rf"^    ({_WORDS})$", prose, re.MULTILINE)
    found += re.findall(rf"`({_WORDS})`", prose)
    return [re.sub(r"\s+#.*", "", line).strip() for line in found]


COMMANDS = sorted({command for document in DOCUMENTS for command in commands_of(document)})


def words_of(command: str) -> list[str]:
    """Without the variables before it."""
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    return words


def prints_the_environment(command: str) -> None:
    result = run([sys.executable, *words_of(command)[1:]], ROOT)
    assert result.code == 0, result.text
    assert f"backend cpu     {_native.isa()} kernels" in result.text


def is_a_target(command: str) -> None:
    """The recipe is complete: make can say what it would do."""
    target = words_of(command)[1]
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert target in phony.split()
    assert run(["make", "-n", target], ROOT).code == 0


def is_understood_by_the_benchmarks(command: str) -> None:
    options = parse(words_of(command)[2:])
    assert options.list or cases.select(cases.all_cases(), options.cases, options.full)


def is_understood_by_the_trainer(command: str) -> None:
    words = words_of(command)
    given = words[words.index("fastalex.train") + 1 :]
    known = ("train", "finetune", "evaluate", "sweep", "ablate")
    with contextlib.suppress(IndexError):
        given = given if given[0] in known else ["train", *given]
    options = train_parser().parse_args(given)
    if getattr(options, "parallel", None) == "towers":
        chosen = given_options(options)
        network = make_model(Options(**DEFAULTS[chosen.get("data", "digits")] | chosen), 10)
        assert network.towers == int(re.search(r"--nproc-per-node (\d)", command)[1])


def has_its_flags(command: str) -> None:
    """A script that tells its arguments, and knows those of the command."""
    _, script, *arguments = words_of(command)
    result = run([sys.executable, script, "--help"], ROOT)
    assert result.code == 0, result.text
    for word in arguments:
        for choice in word.split("|"):
            if not word.startswith(("out/", "docs/")):
                assert choice in result.text, choice


def is_a_module_with_a_main(command: str) -> None:
    spec = importlib.util.find_spec(words_of(command)[2])
    assert spec is not None
    assert spec.origin is not None
    assert '__name__ == "__main__"' in Path(spec.origin).read_text()


def names_tests_that_exist(command: str) -> None:
    """Paths here; that -k selects something is asked below, since collecting takes seconds."""
    words = words_of(command)
    for word in words[words.index("pytest") + 1 :]:
        if "/" in word:
            assert (ROOT / word).exists(), word


def names_an_extra(command: str) -> None:
    (extra,) = re.findall(r"fastalex\[(\w+)\]", command)
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(rf"^{extra} = \[", project, re.MULTILINE)


def is_required_by_the_build(command: str) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    (required,) = re.findall(r"^requires = (.*)$", project, re.MULTILINE)
    for package in words_of(command)[2:]:
        assert f'"{package}"' in required


def is_run_elsewhere(command: str) -> None:
    """Its test is named beside it."""


#: What is done with each command, the first that fits; and why it isn't run here as it stands.
WAYS: list[tuple[str, Callable[[str], None], str]] = [
    (r"python -m fastalex", prints_the_environment, "run"),
    (r"python benchmarks/run\.py --list", has_its_flags, "run, slow: below"),
    (r"(.*=\S+ )?make (bench|gpu-check)", is_a_target, "minutes of timing; needs a GPU"),
    (r"(.*=\S+ )?make (build|test|test-all|lint|docs)", is_a_target, "they run the tests"),
    (r"make (fuzz|abi|wheel)", is_a_target, "minutes to hours; downloads"),
    (r"python benchmarks/run\.py.*squared_relu.*", is_run_elsewhere, "test_tutorial.py"),
    (r"python -m pytest .*squared_relu.*", is_run_elsewhere, "test_tutorial.py"),
    (r"git .*", is_run_elsewhere, "test_tutorial.py"),
    (r"(.*=\S+ )?python benchmarks/run\.py.*", is_understood_by_the_benchmarks, "minutes"),
    (r"python benchmarks/\w+\.py.*", has_its_flags, "minutes of timing"),
    (r"torchrun .* -m fastalex\.train .*", is_understood_by_the_trainer, "test_train_parallel.py"),
    (r"python -m fastalex\.train.*", is_understood_by_the_trainer, "test_train_tools.py"),
    (r"python -m tests\.support\.\w+.*", is_a_module_with_a_main, "the tests of the ledgers"),
    (r"(python -m )?pytest .*", names_tests_that_exist, "part of the suite"),
    (r"pip install '?fastalex\[\w+\]'?", names_an_extra, "downloads"),
    (r"pip install --no-build-isolation \.", is_run_elsewhere, "test_install.py"),
    (r"pip install ninja 'setuptools>=77'", is_required_by_the_build, "downloads"),
]  # fmt: skip


def test_the_documents_name_commands():
    assert len(COMMANDS) > 40
    assert {"make bench", "make test", "python -m fastalex"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    found = [check for pattern, check, _ in WAYS if re.fullmatch(pattern, command)]
    assert found, f"{command}: nothing checks it; give it a line in WAYS"
    found[0](command)


def test_the_reasons_name_tests_that_exist():
    for _, _, reason in WAYS:
        for name in re.findall(r"test_\w+\.py", reason):
            assert (ROOT / "tests" / name).exists(), name


def test_every_command_of_the_tutorial_is_run_by_its_test():
    page = {line for block in tutorial.commands() for line in block}
    assert {c for c in COMMANDS if "squared_relu" in c or c.startswith("git ")} <= page


@pytest.mark.slow
def test_the_cases_are_listed():
    result = run([sys.executable, "benchmarks/run.py", "--list"], ROOT)
    assert result.code == 0, result.text
    assert "alexnet/infer/f32/b32" in result.text.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("pytest") and "-k" in c])
def test_selections_are_not_empty(command):
    result = run([sys.executable, "-m", *words_of(command), "--collect-only", "-q"], ROOT)
    assert result.code == 0, result.text
