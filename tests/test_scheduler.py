"""The scheduler without Ray: rules per failure, order, baselines, and a simulated farm of a thousand workers."""

import dataclasses
import heapq
import random
import subprocess
import sys
import time

import pytest

from qfarm.errors import Failure
from qfarm.matrix import Cell
from qfarm.scheduler import RULES, CellPlan, Scheduler


def make_cell(number: int, model: str = "a", baseline: bool = False) -> Cell:
    return Cell(
        model=model,
        fingerprint=f"fingerprint of {model}",
        tokenizer="t",
        dtype="float32",
        recipe="baseline" if baseline else "rtn",
        methods=(),
        scheme="w16" if baseline else "w4",
        group_size=-1,
        symmetric=False,
        scale_dtype="float16",
        statistics=None,
        calibration=None,
        seed=None if baseline else number,
    )


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
    scheduler.progressed(cells[1].cell_id, 8.0)
    assert scheduler.silent(10.0, 10.0) == []
    assert scheduler.silent(11.0, 10.0) == [(cells[0].cell_id, "w1")]


def test_the_same_cell_twice_is_our_mistake():
    with pytest.raises(AssertionError, match="planned twice"):
        Scheduler(plans(make_cell(0), make_cell(0)), retries=0)


@dataclasses.dataclass
class Farm:
    """A simulated farm: every worker fails and is preempted at random, and comes back at once under a new name."""

    scheduler: Scheduler
    seconds: dict[str, float]
    workers: int
    chance: random.Random
    fail: float  # chance of a charged failure per attempt
    preempt: float
    now: float = 0.0
    busy_s: float = 0.0
    loads: int = 0  # times a worker had to load a model
    ended: list[tuple[str, bool]] = dataclasses.field(default_factory=list)  # cell id, finished
    started: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    closed_at: dict[str, float] = dataclasses.field(default_factory=dict)

    def run(self) -> float:
        """Until nothing is left; returns the makespan in simulated seconds."""
        idle = [f"w{i}" for i in range(self.workers)]
        running: list[tuple[float, int, str, str, str]] = []  # end, tie, worker, cell, how it ends
        model_of: dict[str, str] = {}
        serial = self.workers
        while not self.scheduler.done:
            while idle and (cell := take(self.scheduler, idle[-1], self.now)):
                worker, cell_id = idle.pop(), cell.cell_id
                self.loads += model_of.get(worker) != cell.model
                model_of[worker] = cell.model
                self.started.setdefault(cell_id, []).append(self.now)
                draw, seconds = self.chance.random(), self.seconds[cell_id]
                end = "fail" if draw < self.fail else "preempt" if draw < self.fail + self.preempt else "finish"
                seconds *= 1.0 if end == "finish" else self.chance.random()
                self.busy_s += seconds
                heapq.heappush(running, (self.now + seconds, len(self.started), worker, cell_id, end))
            due = self.scheduler.next_due(self.now)
            if due is not None and (not running or self.now + due < running[0][0]) and idle:
                self.now += due
                continue
            self.now, _, worker, cell_id, end = heapq.heappop(running)
            if end == "finish":
                assert self.scheduler.finished(cell_id, worker, self.now)
                self.close(cell_id, True)
            elif end == "fail":
                if self.scheduler.failed(cell_id, worker, Failure.BUG, self.now) is None:
                    self.close(cell_id, False)
            else:
                [(lost, delay)] = self.scheduler.lost(worker, self.now, preempted=True)
                assert lost == cell_id and delay is not None
                serial += 1
                worker = f"w{serial}"
            idle.append(worker)
        return self.now

    def close(self, cell_id: str, finished: bool) -> None:
        self.ended.append((cell_id, finished))
        self.closed_at[cell_id] = self.now


def simulate(
    models: int, cells: int, workers: int, seed: int, fail: float = 0.05, preempt: float = 0.05
) -> tuple[Farm, float, list[CellPlan]]:
    chance = random.Random(seed)
    work = [CellPlan(cell=make_cell(0, f"m{i}", baseline=True)) for i in range(models)]
    for i in range(cells - models):
        cell = make_cell(i, f"m{chance.randrange(models)}")
        work.append(CellPlan(cell=cell, needs_baseline=chance.random() < 0.5))
    seconds = {plan.cell.cell_id: chance.uniform(100, 900) for plan in work}
    estimates = {cell_id: value * chance.uniform(0.9, 1.1) for cell_id, value in seconds.items()}
    scheduler = Scheduler(work, retries=3, estimates=estimates)
    farm = Farm(scheduler, seconds, workers, chance, fail, preempt)
    return farm, farm.run(), work


@pytest.mark.parametrize(("models", "workers", "seed"), [(20, 1000, 0), (20, 1000, 1), (1, 1000, 2), (300, 37, 3)])
def test_simulated_farm_with_failures_and_preemptions(models: int, workers: int, seed: int):
    farm, makespan, work = simulate(models, 5000, workers, seed)
    by_id = {plan.cell.cell_id: plan for plan in work}
    assert sorted(cell_id for cell_id, _ in farm.ended) == sorted(by_id)  # each exactly once
    counts = farm.scheduler.counts
    assert counts.finished == sum(finished for _, finished in farm.ended)
    assert counts.finished + counts.given_up == len(work) and counts.open == 0
    assert counts.finished > 0.99 * len(work)
    baselines = {plan.cell.model: plan.cell.cell_id for plan in work if plan.cell.is_baseline}
    for cell_id, plan in by_id.items():
        if plan.needs_baseline:
            assert farm.started[cell_id][0] >= farm.closed_at[baselines[plan.cell.model]]
    # A cell that fails at the very end has to run again whatever the schedule: the last few may be one cell late.
    bound = 1.1 * farm.busy_s / workers
    late = sum(closed > bound for closed in farm.closed_at.values())
    assert late <= 0.01 * len(work) and makespan <= bound + max(farm.seconds.values())
    preempted = sum(len(starts) for starts in farm.started.values()) - len(work)
    assert farm.loads <= workers + preempted + 2 * models + 0.1 * len(work)


@pytest.mark.parametrize(("models", "workers"), [(1, 1000), (20, 1000), (300, 37), (37, 300), (2000, 100)])
def test_makespan_is_near_the_lower_bound(models: int, workers: int):
    farm, makespan, work = simulate(models, 5000, workers, seed=5, fail=0.0, preempt=0.0)
    assert len(farm.ended) == len(work)
    assert makespan <= 1.1 * farm.busy_s / workers


def test_cost_grows_with_the_cells_and_not_with_their_square():
    def cost(cells: int) -> float:
        began = time.process_time()
        simulate(50, cells, 1000, seed=4)
        return time.process_time() - began

    small, large = cost(3_000), cost(24_000)
    assert large < 24 * small  # 8 times is linear, 64 times would be quadratic


@pytest.mark.slow
def test_a_hundred_thousand_cells():
    farm, makespan, work = simulate(50, 100_000, 1000, seed=4)
    assert farm.scheduler.done and len(farm.ended) == len(work)
    assert makespan <= 1.1 * farm.busy_s / 1000


def test_importing_the_scheduler_loads_neither_ray_nor_torch():
    code = "import sys, qfarm.scheduler; print(sorted({'ray', 'torch', 'transformers', 'rich'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
