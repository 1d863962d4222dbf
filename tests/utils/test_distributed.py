"""Several processes that share one run: real ones."""

from pathlib import Path

import pytest
from conftest import run_program

from utils.distributed import from_main, gather, is_main, own_part, rank, share, world_size

PREAMBLE = """
from utils.distributed import *
join_group()
def fact(*values):
    open(f"fact{rank()}", "a").write(" ".join(map(str, values)))
"""


def launch(program: str, folder: Path, processes: int = 2) -> list[str]:
    """Run `program` in that many processes; what each of them called a fact, by rank."""
    done = run_program(PREAMBLE + program, folder, processes=processes)
    facts = [folder / f"fact{number}" for number in range(processes)]
    assert all(path.exists() for path in facts), done.stderr
    return [path.read_text() for path in facts]


def test_alone_everything_is_trivial():
    assert (rank(), world_size(), is_main()) == (0, 1, True)
    assert gather(3) == [3]
    assert own_part([1, 2, 3]) == [1, 2, 3]
    assert list(share([1, 2, 3], lambda item: item * 10)) == [10, 20, 30]
    assert from_main(lambda: 5) == 5


def test_alone_a_failure_keeps_its_type_and_what_was_done_before_it():
    results = share([1, 0, 2], lambda item: 1 / item)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.parametrize("processes", [2, 3])
def test_items_are_shared_once_each_and_all_have_all_results_in_order(processes, tmp_path):
    program = (
        "made = list(share(range(7), lambda item: (item, rank())))\n"
        "whole = [item for part in gather(list(own_part(range(7)))) for item in part]\n"
        "fact([m[0] for m in made], len({m[1] for m in made}), whole, from_main(lambda: f'from {rank()}'))\n"
        "leave_group()\n"
    )
    items = list(range(7))
    assert launch(program, tmp_path, processes) == [f"{items} {processes} {items} from 0"] * processes


def test_a_failure_on_one_process_ends_all_with_its_message(tmp_path):
    program = (
        "try:\n"
        "    list(share(range(4), lambda item: 1 / (item - 1)))\n"
        "except Exception as error:\n"
        "    fact(type(error).__name__, error)\n"
    )
    assert launch(program, tmp_path) == [
        "RuntimeError process 1 failed: ZeroDivisionError: division by zero",
        "ZeroDivisionError division by zero",
    ]


def test_models_are_made_equal_to_the_main_one(tmp_path):
    program = (
        "import torch\n"
        "torch.manual_seed(rank())\n"
        "model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))\n"
        "make_equal_(model)\n"
        "first, second = gather(model.state_dict())\n"
        "fact(all(torch.equal(first[name], second[name]) for name in first))\n"
    )
    assert launch(program, tmp_path) == ["True", "True"]
