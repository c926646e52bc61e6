"""What stands in a journal is what processes did not survive, however they ended."""

import os

import pytest

from ffattr.corpus.journal import Journal


def test_what_ended_is_crossed_out_and_what_did_not_is_counted(tmp_path):
    path = tmp_path / "shard"
    journal = Journal(path)
    with journal.enter("batch", [1, 0], [2, 0]):
        pass
    with pytest.raises(KeyError), journal.enter("read"):
        raise KeyError
    dying = [journal.enter("batch", [1, 0], [2, 0])]
    dying[0].__enter__()  # and here the process ends
    for deaths in (1, 2):
        again = Journal(path)
        assert again.count_deaths("batch", [1, 0], [2, 0]) == again.count_deaths("batch", (1, 0), (2, 0)) == deaths
        assert again.count_deaths("read") == again.count_deaths("batch", [1, 0]) == 0
        dying.append(again.enter("batch", [1, 0], [2, 0]))
        dying[-1].__enter__()


def test_a_line_that_ends_in_the_middle_is_none(tmp_path):
    path = tmp_path / "shard"
    path.write_bytes(b'\n\n["alone", 7]\n\n\n["alone", 7')
    journal = Journal(path)
    assert journal.count_deaths("alone", 7) == 1
    dying = journal.enter("alone", 7)
    dying.__enter__()
    assert Journal(path).count_deaths("alone", 7) == 2


def test_closing_may_remove(tmp_path):
    journal = Journal(tmp_path / "shard")
    journal.close(remove=True)
    assert os.listdir(tmp_path) == []
