"""The scheduler without Ray: rules per failure, order, baselines, and a simulated farm of a thousand workers."""

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from qfarm import scheduler
from qfarm.bench.simulated import Farm, Report, Settings, plans_of, simulate, simulated_cell
from qfarm.errors import Failure
from qfarm.matrix import Cell
from qfarm.scheduler import RULES, CellPlan, Scheduler


def make_cell(number: int, model: str = "a", baseline: bool = False) -> Cell:
    return simulated_cell(number, model, baseline)


def plans(*cells: Cell, needy: bool = False) -> list[CellPlan]:
    return [CellPlan(cell=cell, needs_baseline=needy and not cell.is_baseline) for cell in cells]


def take(scheduler: Scheduler, worker: str, now: float = 0.0) -> Cell | None:
    cell = scheduler.ready(worker, now)
    if cell is not None:
        scheduler.started(cell.cell_id, worker, now)
    return cell


def test_cells_come_in_the_jobs_order_without_estimates():
    cells = [make_cell(i) for i in range(5)]
    scheduler = Scheduler(plans(*cells), retries=0)
    assert [take(scheduler, f"w{i}") for i in range(6)] == [*cells, None]


def test_longest_expected_cell_comes_first():
    cells = [make_cell(i) for i in range(3)]
    estimates = {cells[0].cell_id: 1.0, cells[1].cell_id: 3.0, cells[2].cell_id: 2.0}
    scheduler = Scheduler(plans(*cells), retries=0, estimates=estimates)
    assert [take(scheduler, f"w{i}") for i in range(3)] == [cells[1], cells[2], cells[0]]


def test_a_cell_without_estimate_counts_as_an_average_one():
    cells = [make_cell(i) for i in range(3)]
    estimates = {cells[0].cell_id: 1.0, cells[1].cell_id: 3.0}
    scheduler = Scheduler(plans(*cells), retries=0, estimates=estimates)
    assert [take(scheduler, f"w{i}") for i in range(3)] == [cells[1], cells[2], cells[0]]


def test_a_worker_keeps_its_model_and_new_workers_spread():
    first, second = [make_cell(i, "a") for i in range(3)], [make_cell(i, "b") for i in range(3)]
    scheduler = Scheduler(plans(*first, *second), retries=0)
    assert take(scheduler, "w1").model == "a"
    assert take(scheduler, "w2").model == "b"
    for worker, model in (("w1", "a"), ("w2", "b"), ("w2", "b"), ("w1", "a")):
        cell = take(scheduler, worker)
        assert cell.model == model
    assert take(scheduler, "w1") is None


def test_a_worker_moves_on_when_its_model_has_nothing_left():
    scheduler = Scheduler(plans(make_cell(0, "a"), make_cell(0, "b"), make_cell(1, "b")), retries=0)
    models = [take(scheduler, "w1").model for _ in range(3)]
    assert models == ["b", "b", "a"]  # b has more to do


def test_the_next_load_is_known_once_a_workers_model_has_nothing_left_to_hand_out():
    first, second = [make_cell(i, "a") for i in range(2)], [make_cell(9, "b", baseline=True), make_cell(1, "b")]
    scheduler = Scheduler(plans(*first, *second, needy=True), retries=0)
    assert scheduler.next_load("w1") is None  # it holds no model
    assert take(scheduler, "w1") == first[0] and scheduler.next_load("w1") is None
    assert take(scheduler, "w1") == first[1] and scheduler.next_load("w1") == second[0]
    assert scheduler.next_load("w1", gpus=1.0) is None
    assert take(scheduler, "w2") == second[0] and scheduler.next_load("w1") is None  # its cells wait for the baseline
    scheduler.finished(second[0].cell_id, "w2", 1.0)
    assert scheduler.next_load("w1") == second[1] and scheduler.next_load("w2") is None
    assert take(scheduler, "w2") == second[1]


def test_spreading_follows_the_work_that_is_left():
    cells = [make_cell(i, "large") for i in range(90)] + [make_cell(i, "small") for i in range(10)]
    scheduler = Scheduler(plans(*cells), retries=0)
    models = [take(scheduler, f"w{i}").model for i in range(20)]
    assert 2 <= models.count("small") <= 3


def test_the_baseline_precedes_the_cells_that_need_it():
    baseline, cells = make_cell(0, baseline=True), [make_cell(i) for i in range(2)]
    scheduler = Scheduler(plans(*cells, baseline, needy=True), retries=0)
    assert take(scheduler, "w1") == baseline
    assert take(scheduler, "w2") is None
    assert scheduler.counts.blocked == 2
    scheduler.finished(baseline.cell_id, "w1", 1.0)
    ready = [take(scheduler, worker, 1.0) for worker in ("w1", "w2")]
    assert sorted(cell.cell_id for cell in ready) == sorted(cell.cell_id for cell in cells)


def test_cells_that_need_no_baseline_do_not_wait():
    baseline, cell = make_cell(0, baseline=True), make_cell(0)
    scheduler = Scheduler(plans(cell, baseline), retries=0)
    assert take(scheduler, "w1") == baseline  # first within its model all the same
    assert take(scheduler, "w2") == cell


def test_a_baseline_finished_earlier_blocks_nobody():
    scheduler = Scheduler([CellPlan(cell=make_cell(0), needs_baseline=True)], retries=0)
    assert take(scheduler, "w1") is not None


def test_a_given_up_baseline_frees_its_cells():
    baseline, cell = make_cell(0, baseline=True), make_cell(0)
    scheduler = Scheduler(plans(baseline, cell, needy=True), retries=0)
    take(scheduler, "w1")
    assert scheduler.failed(baseline.cell_id, "w1", Failure.INVALID, 0.0) is None
    assert take(scheduler, "w1") == cell
    scheduler.finished(cell.cell_id, "w1", 1.0)
    assert scheduler.done
    assert scheduler.given_up == (baseline,)


def test_another_models_baseline_blocks_nobody():
    scheduler = Scheduler(
        [CellPlan(cell=make_cell(0, "a", baseline=True)), CellPlan(cell=make_cell(0, "b"), needs_baseline=True)],
        retries=0,
    )
    assert {take(scheduler, "w1").model, take(scheduler, "w2").model} == {"a", "b"}


def test_a_worker_stays_with_the_statistics_that_it_has():
    cells = [make_cell(i) for i in range(6)]
    seconds = {cell.cell_id: 10.0 - i for i, cell in enumerate(cells)}
    work = [CellPlan(cell=cell, shared="ab"[i % 2]) for i, cell in enumerate(cells)]
    scheduler = Scheduler(work, retries=0, estimates=seconds)
    order = [take(scheduler, worker).seed for worker in ("w1", "w2", "w1", "w2", "w1", "w1")]
    assert order == [0, 1, 2, 3, 4, 5]  # w1: a, w2: b, and in the end w1 takes what is left of b


def test_a_new_worker_begins_with_statistics_that_nobody_has():
    cells = [make_cell(i) for i in range(3)]
    work = [CellPlan(cell=cell, shared=shared) for cell, shared in zip(cells, "aab", strict=True)]
    scheduler = Scheduler(work, retries=0, estimates={cell.cell_id: 9.0 - i for i, cell in enumerate(cells)})
    assert [take(scheduler, worker).seed for worker in ("w1", "w2", "w3")] == [0, 2, 1]
    scheduler.lost("w1", 0.0, preempted=True)
    assert take(scheduler, "w4", 99.0).seed == 0


def test_workers_take_only_cells_of_their_own_size():
    small, large = make_cell(0), make_cell(1)
    scheduler = Scheduler([CellPlan(cell=small, gpus=0.25), CellPlan(cell=large, gpus=2.0)], retries=0)
    assert list(scheduler.open_by_gpus.items()) == [(2.0, 1), (0.25, 1)]
    assert scheduler.ready("w1", 0.0, gpus=1.0) is None
    assert scheduler.ready("w2", 0.0, gpus=0.25) == small
    assert scheduler.ready("w3", 0.0, gpus=2.0) == large
    scheduler.finished(large.cell_id, "w3", 1.0)
    assert scheduler.open_by_gpus == {0.25: 1}


def test_a_baseline_of_another_size_is_waited_for_all_the_same():
    baseline, cell = make_cell(0, baseline=True), make_cell(0)
    work = [CellPlan(cell=baseline, gpus=0.5), CellPlan(cell=cell, needs_baseline=True, gpus=1.0)]
    scheduler = Scheduler(work, retries=0)
    assert scheduler.open_by_gpus == {0.5: 1}  # workers for the cell would hold the GPU that the baseline needs
    assert scheduler.ready("w1", 0.0, gpus=1.0) is None
    assert scheduler.ready("w2", 0.0, gpus=0.5) == baseline
    scheduler.finished(baseline.cell_id, "w2", 1.0)
    assert scheduler.open_by_gpus == {1.0: 1}
    assert scheduler.ready("w1", 1.0, gpus=1.0) == cell


def straggling(finished: int = 3, expected: float = 100.0) -> tuple[Scheduler, list[Cell]]:
    """Cells that took twice what was expected, and one more that runs on node n1 since time 0."""
    cells = [make_cell(i) for i in range(finished + 1)]
    scheduler = Scheduler(plans(*cells), retries=1, estimates={cell.cell_id: expected for cell in cells})
    for i, cell in enumerate(cells):
        assert scheduler.ready(f"w{i}", 0.0, node="n1") == cell
        scheduler.started(cell.cell_id, f"w{i}", 0.0)
    for i, cell in enumerate(cells[:-1]):
        scheduler.finished(cell.cell_id, f"w{i}", 2 * expected)
    return scheduler, cells


def test_a_straggler_gets_a_second_copy_on_another_node():
    scheduler, (*_, late) = straggling()
    assert scheduler.pace == 2.0
    assert scheduler.ready("w0", 401.0, node="n1") is None  # its own node
    assert scheduler.ready("v", 400.0, node="n2") is None  # twice 200 s are not over
    assert scheduler.ready("v", 401.0 + 10, node="n2") == late
    assert scheduler.ready("u", 402.0 + 20, node="n3") is None  # two copies are enough
    scheduler.started(late.cell_id, "v", 411.0)
    assert scheduler.finished(late.cell_id, "v", 500.0)
    assert not scheduler.finished(late.cell_id, "w3", 501.0)
    assert scheduler.done and scheduler.counts.finished == 4


@pytest.mark.parametrize(("finished", "expected"), [(2, 100.0), (3, 5.0)])
def test_no_copies_before_expectations_are_known_or_of_short_cells(finished: int, expected: float):
    scheduler, _ = straggling(finished, expected)
    assert scheduler.ready("v", 59.0 if expected < 100 else 9999.0, node="n2") is None


def test_a_cell_is_given_up_only_when_both_copies_have_failed():
    scheduler, (*_, late) = straggling()
    assert scheduler.ready("v", 500.0, node="n2") == late
    scheduler.started(late.cell_id, "v", 500.0)
    assert scheduler.failed(late.cell_id, "w3", Failure.BUG, 600.0) == 0.0
    assert scheduler.counts.running == 1
    assert scheduler.failed(late.cell_id, "v", Failure.BUG, 700.0) is None
    assert scheduler.given_up == (late,)


def test_life_without_progress_ends_at_ten_times_what_was_expected():
    scheduler, (*_, late) = straggling()
    scheduler.progressed(late.cell_id, "w3", 300.0)
    scheduler.progressed(late.cell_id, "w3", 9000.0, moved=False)
    assert scheduler.silent(9001.0, 10.0) == []
    assert scheduler.stalled(300.0 + 2000.0, 60.0) == []  # 10 x 100 s at the pace of 2
    assert scheduler.stalled(300.0 + 2001.0, 60.0) == [(late.cell_id, "w3", 2000.0)]
    assert scheduler.stalled(300.0 + 2001.0, 5000.0) == []


def fail_until_given_up(kind: Failure, retries: int, limit: int = 12) -> list[float]:
    """The delays of one cell that always fails in this way."""
    cell = make_cell(0)
    scheduler = Scheduler(plans(cell), retries=retries)
    delays, now = [], 0.0
    while len(delays) < limit:
        assert take(scheduler, "w1", now) == cell
        delay = scheduler.failed(cell.cell_id, "w1", kind, now)
        if delay is None:
            assert scheduler.done and scheduler.given_up == (cell,)
            return delays
        assert take(scheduler, "w1", now + delay * 0.99) is None
        assert scheduler.next_due(now) == delay
        delays.append(delay)
        now += delay
    return delays


def test_every_kind_of_failure_has_a_rule():
    assert set(RULES) == set(Failure)


@pytest.mark.parametrize("kind", [Failure.INVALID, Failure.NONFINITE])
def test_hopeless_kinds_are_given_up_at_once(kind: Failure):
    assert fail_until_given_up(kind, retries=5) == []


@pytest.mark.parametrize("kind", [Failure.BUG, Failure.OOM, Failure.WORKER_DIED, Failure.NODE_DIED, Failure.HUNG])
def test_charged_kinds_are_retried_with_growing_delays(kind: Failure):
    assert fail_until_given_up(kind, retries=3) == [2.0, 4.0, 8.0]
    assert fail_until_given_up(kind, retries=0) == []


def test_delays_have_a_cap():
    assert fail_until_given_up(Failure.BUG, retries=8)[-3:] == [60.0, 60.0, 60.0]


def test_preemption_is_free_of_charge():
    delays = fail_until_given_up(Failure.PREEMPTED, retries=0, limit=12)
    assert len(delays) == 12 and delays[0] == 1.0 and delays[-1] == 60.0


def test_an_unavailable_hub_is_given_more_time():
    assert fail_until_given_up(Failure.UNAVAILABLE, retries=2) == [30.0, 60.0]


def test_retries_are_counted_over_all_kinds():
    cell = make_cell(0)
    scheduler = Scheduler(plans(cell), retries=1)
    take(scheduler, "w1", 0.0)
    assert scheduler.failed(cell.cell_id, "w1", Failure.BUG, 0.0) is not None
    take(scheduler, "w1", 10.0)
    assert scheduler.failed(cell.cell_id, "w1", Failure.OOM, 10.0) is None


def test_out_of_memory_asks_for_a_smaller_attempt():
    cell = make_cell(0)
    scheduler = Scheduler(plans(cell), retries=5)
    assert scheduler.attempt(cell.cell_id).number == 0
    for number, kind in enumerate([Failure.OOM, Failure.BUG, Failure.OOM], start=1):
        take(scheduler, "w1", 100.0 * number)
        assert scheduler.attempt(cell.cell_id).number == number
        scheduler.failed(cell.cell_id, "w1", kind, 100.0 * number)
    take(scheduler, "w1", 1000.0)
    assert scheduler.attempt(cell.cell_id).number == 4
    assert scheduler.attempt(cell.cell_id).shrink == 2


def test_a_given_up_cell_does_not_stop_the_rest():
    cells = [make_cell(i) for i in range(2)]
    scheduler = Scheduler(plans(*cells), retries=0)
    take(scheduler, "w1")
    scheduler.failed(cells[0].cell_id, "w1", Failure.BUG, 0.0)
    assert take(scheduler, "w1") == cells[1]
    assert not scheduler.done and scheduler.open_cells == (cells[1],)
    scheduler.finished(cells[1].cell_id, "w1", 1.0)
    assert scheduler.done
    assert (scheduler.counts.finished, scheduler.counts.given_up, scheduler.counts.open) == (1, 1, 0)


@pytest.mark.parametrize(("preempted", "delay"), [(True, 1.0), (False, None)])
def test_a_lost_worker_gives_its_cell_back(preempted: bool, delay: float | None):
    cell = make_cell(0)
    scheduler = Scheduler(plans(cell), retries=0)
    take(scheduler, "w1")
    assert scheduler.lost("w1", 5.0, preempted) == [(cell.cell_id, delay)]
    assert scheduler.done is (delay is None)
    assert scheduler.lost("w1", 6.0, preempted) == []


def test_a_result_that_comes_after_all_counts_once():
    """A worker that was taken for lost publishes its cell while the retry waits."""
    cell = make_cell(0)
    scheduler = Scheduler(plans(cell), retries=1)
    take(scheduler, "w1")
    scheduler.lost("w1", 0.0, preempted=False)
    assert scheduler.finished(cell.cell_id, "w1", 1.0)
    assert not scheduler.finished(cell.cell_id, "w1", 1.5)
    assert scheduler.next_due(1.0) is None and take(scheduler, "w2", 100.0) is None
    assert scheduler.done and scheduler.counts.finished == 1


def test_a_returned_attempt_counts_as_if_it_had_not_been():
    cell = make_cell(0)
    scheduler = Scheduler(plans(cell), retries=0)
    take(scheduler, "w1")
    scheduler.returned(cell.cell_id, "w1")
    assert scheduler.lost("w1", 0.0, preempted=False) == []
    assert take(scheduler, "w2") == cell and scheduler.attempt(cell.cell_id).number == 1


def test_tick_says_whose_retry_is_due():
    cell = make_cell(0)
    scheduler = Scheduler(plans(cell), retries=1)
    take(scheduler, "w1")
    scheduler.failed(cell.cell_id, "w1", Failure.BUG, 0.0)
    assert scheduler.counts.backoff == 1 and scheduler.tick(1.9) == []
    assert scheduler.tick(2.0) == [cell] and scheduler.tick(2.0) == []


def test_silence_is_measured_from_the_last_sign_of_life():
    cells = [make_cell(i) for i in range(2)]
    scheduler = Scheduler(plans(*cells), retries=1)
    take(scheduler, "w1", 0.0)
    take(scheduler, "w2", 0.0)
    scheduler.progressed(cells[1].cell_id, "w2", 8.0)
    assert scheduler.silent(10.0, 10.0) == []
    assert scheduler.silent(11.0, 10.0) == [(cells[0].cell_id, "w1")]


def test_the_same_cell_twice_is_our_mistake():
    with pytest.raises(AssertionError, match="planned twice"):
        Scheduler(plans(make_cell(0), make_cell(0)), retries=0)


def simulated(models: int, cells: int, workers: int, seed: int, **changes: Any) -> tuple[Report, Farm]:
    """Without changes nothing fails, nobody straggles and nobody is taken away."""
    calm = Settings(models=models, cells=cells, workers=workers, seed=seed, fail=0.0, preempt=0.0, straggle=0.0)
    return simulate(dataclasses.replace(calm, **changes))


@pytest.mark.parametrize(("models", "workers", "seed"), [(20, 200, 0), (1, 200, 2), (100, 37, 3)])
def test_simulated_farm_in_which_everything_goes_wrong(models: int, workers: int, seed: int):
    chances = {"fail": 0.05, "preempt": 0.05, "straggle": 0.005}
    report, farm = simulated(models, 3000, workers, seed, **chances, retries=3)
    plans, _, _ = plans_of(report.settings)
    assert set(farm.accepted.values()) == {1} and len(farm.accepted) == report.finished  # each exactly once
    assert report.finished + report.given_up == 3000 == len(farm.closed) and report.given_up < 10
    assert farm.scheduler.counts.open == 0 and report.attempts > 1.08 * 3000
    baselines = {plan.cell.model: plan.cell.cell_id for plan in plans if plan.cell.is_baseline}
    for plan in plans:
        if plan.needs_baseline:
            assert farm.started[plan.cell.cell_id] >= farm.closed[baselines[plan.cell.model]]
    lost = report.attempts - 3000
    assert report.loads <= workers + lost + 2 * models + 0.1 * 3000


@pytest.mark.parametrize(("models", "workers"), [(1, 200), (20, 200), (60, 7), (7, 60), (400, 20)])
def test_makespan_is_near_the_lower_bound(models: int, workers: int):
    report, _ = simulated(models, 1000, workers, seed=5)
    longest = report.settings.longest_s
    assert report.ratio <= 1.05 or report.makespan_s <= report.bound_s + 0.5 * longest
    assert report.finished == 1000 and report.hedged == 0


def test_second_copies_shorten_the_wait_for_stragglers():
    slow = {"straggle": 0.01}
    with_copies, farm = simulated(5, 1000, 100, 3, **slow)
    without, _ = simulated(5, 1000, 100, 3, **slow, hedge=False)
    assert with_copies.hedged > 0 and without.hedged == 0
    assert with_copies.makespan_s < 0.8 * without.makespan_s
    assert set(farm.accepted.values()) == {1} and with_copies.finished == 1000


def lines_run(function) -> int:
    """How many lines of the scheduler run inside: a cost that no other process can move."""
    count, before = 0, sys.gettrace()

    def line(frame, event, argument):
        nonlocal count
        count += event == "line"
        return line

    def call(frame, event, argument):
        return line if frame.f_code.co_filename == scheduler.__file__ else None

    sys.settrace(call)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def test_cost_grows_with_the_cells_and_not_with_their_square():
    small, large = (lines_run(lambda cells=cells: simulated(50, cells, 200, seed=4)) for cells in (500, 4_000))
    assert 2 * small < large < 12 * small  # 8 times is linear (less with what every run costs), 64 times quadratic


@pytest.mark.slow
def test_a_hundred_thousand_cells_on_a_thousand_workers():
    report, farm = simulate(Settings())
    assert farm.scheduler.done and report.finished + report.given_up == 100_000
    assert report.ratio <= 1.05


def test_importing_the_scheduler_loads_neither_ray_nor_torch():
    code = "import sys, qfarm.scheduler; print(sorted({'ray', 'torch', 'transformers', 'rich'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
