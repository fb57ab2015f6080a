"""The printed outcome of proofs, and the list of them."""

from utils.prove.registry import PROOFS
from utils.script import prove


def test_the_lines_of_a_proof(flags, capsys):
    prove.main([*flags, "--only", "padding_free", "--rows", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("✓ padding_free") and lines[-1] == "1 hold, 0 do not, 0 do not apply"
    assert " and " in lines[1] and lines[1].endswith("tolerance 1e-05") and lines[1].startswith("    loss: ")


def test_the_list_names_every_proof_and_its_tolerance(capsys):
    prove.main(["--list"])
    said = capsys.readouterr().out
    assert all(f"{name}: {proof.says}" in said and proof.tolerance in said for name, proof in PROOFS.items())
