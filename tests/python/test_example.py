"""The example under clients/python does what its README says."""

import os
import subprocess
import sys

import numpy as np
from conftest import ROOT, STUBS
from thenar.v1.palm_pb2 import HAND_LEFT, HAND_RIGHT


def terminal(server, *words):
    """Runs the example as a reader would: exit code, standard output, standard error."""
    ran = subprocess.run(
        [sys.executable, "-B", ROOT / "clients" / "python" / "terminal.py", "--server", server.address, *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(STUBS)},
    )
    return ran.returncode, ran.stdout.splitlines(), ran.stderr


def test_a_person_enrols_pays_passes_the_gate_and_is_forgotten(server, people, tmp_path):
    subject_id, palms = people.new((HAND_LEFT, HAND_RIGHT))
    files = {}
    for name, vector in {
        "left": palms[0][1],
        "right": palms[1][1],
        "left-again": people.capture(palms[0][1]),
        "right-again": people.capture(palms[1][1]),
        "stranger": people.palm(),
    }.items():
        files[name] = str(tmp_path / f"{name}.npy")
        np.save(files[name], vector.astype(np.float32))

    code, said, _ = terminal(server, "pay", files["left-again"])
    assert (code, said) == (1, ["DECISION_NO_MATCH"])
    code, said, errors = terminal(server, "enrol", subject_id, files["left"], files["right"])
    assert (code, said) == (0, [f"{subject_id} enrolled with 2 palms"]), errors
    code, _, errors = terminal(server, "enrol", subject_id, files["left"])
    assert code == 1 and errors.startswith("ALREADY_EXISTS: "), errors
    code, said, _ = terminal(server, "pay", files["left-again"], files["right-again"])
    assert code == 0 and said[0] == "DECISION_MATCH" and said[1].startswith(f"1. {subject_id} 0.")
    code, said, _ = terminal(server, "gate", files["right-again"], files["stranger"], files["left-again"])
    assert (code, said) == (1, [subject_id, "stays outside", subject_id])
    code, said, _ = terminal(server, "forget", subject_id)
    assert (code, said) == (0, [f"{subject_id} forgotten, 2 palms erased"])
    code, said, _ = terminal(server, "gate", files["right-again"])
    assert (code, said) == (1, ["stays outside"])
