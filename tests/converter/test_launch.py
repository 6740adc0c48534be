import json
import sys

import pytest

from onnx_lathe.converter import launch
from onnx_lathe.converter.cli import main as cli


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 0.0)


def lathe(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["lathe", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_a_size_without_a_rank_is_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.processes() == 1
    assert launch.leads()


def test_verbs_that_are_not_distributed_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_process(monkeypatch, 0)
    assert lathe(monkeypatch, "inspect", "model.onnx") == 2
    printed = capsys.readouterr()
    message = "lathe inspect: got 2 processes, expected one: only train and distill are distributed."
    assert json.loads(printed.out)["message"].startswith(message)
    assert message in printed.err


def test_the_others_speak_only_where_the_leading_process_did_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_process(monkeypatch, 1)
    said: list[str] = []
    monkeypatch.setattr(launch, "give_way", lambda: said.append(capsys.readouterr().err))
    assert lathe(monkeypatch, "train", "absent.toml") == 2
    assert said == [""]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "error: process 1: absent.toml: got no such file" in printed.err
