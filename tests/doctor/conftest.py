"""Fixtures of the doctor's tests: a run that is examined, its report, and no estimate of memory."""

import json

import pytest
from doctor_case import DoctorCase, WeightsReached

from utils.doctor import resources
from utils.script import doctor


@pytest.fixture(autouse=True)
def no_estimate(monkeypatch):
    """An estimate takes half a second; what is done with one is tested in test_resources.py."""
    monkeypatch.setattr(resources, "try_estimate", lambda *_: None)


@pytest.fixture
def case(tmp_path, tiny_models, monkeypatch):
    return DoctorCase(tmp_path, tiny_models, monkeypatch)


@pytest.fixture
def report(capsys):
    """Runs the command; returns its exit code and its JSON report."""

    def run(*argv):
        capsys.readouterr()
        code = doctor.main(["--json", "true", *argv])
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def no_weights(monkeypatch):
    """main_train.py comes as far as the weights, and no farther."""

    def load(*_):
        raise WeightsReached

    monkeypatch.setattr("utils.model.load.load_model", load)
