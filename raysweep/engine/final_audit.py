"""Audits the candidates that the search chose, on seeds it never saw, attacks the finalists, and writes front and report."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from raysweep.auditing.anchors import Unmeasured
from raysweep.auditing.power import requirements
from raysweep.auditing.request import AuditRequest
from raysweep.config.schema import Tier
from raysweep.context import Context
from raysweep.engine.audits import Audits, measure_anchors
from raysweep.engine.cluster import RunFailed
from raysweep.engine.engine import Engine
from raysweep.engine.profiling import phase
from raysweep.engine.remake import remake
from raysweep.engine.retention import keep_only
from raysweep.models import stored
from raysweep.results.front import Front, audited_front, judged_by_attacks, write_front
from raysweep.results.paired import write_paired
from raysweep.results.trials import Trial, pick_for_audit


@dataclass
class FinalAudit:
    """The audits after the search.

    trials: all of the sweep; picked: trial -> those that are audited. audits: tier -> subject -> key of its audit.
    incomplete: checks that failed or are missing so far.
    """

    engine: Engine
    context: Context
    trials: list[Trial]
    incomplete: list[str]
    picked: dict[str, Trial]
    audits: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, engine: Engine, context: Context, trials: list[Trial], incomplete: list[str]) -> FinalAudit:
        """Picks the candidates; raises RunFailed if there are none."""
        picked = pick_for_audit(trials, engine.sweep.audit.top)
        if not picked:
            reasons = sorted({t.reason for t in trials if t.state == "FAIL"})[:3]
            raise RunFailed(f"no candidate: all {len(trials)} trials failed ({'; '.join(reasons)})")
        return cls(engine, context, trials, incomplete, {t.trial: t for t in picked})

    def conclude(self) -> Front:
        """Audits, attacks, and writes the front, paired differences and the report."""
        from raysweep.report.page import build

        engine = self.engine
        keep_only(engine.folder, engine.sweep, self.trials, self.picked)
        with phase(engine, "prepare"):
            self.restore()
        made = sum(t.is_complete for t in self.trials)
        if engine.sweep.candidates.keep != "all" and made > len(self.picked):
            dropped = f"of {made} candidates the weights of the {len(self.picked)} to be audited are kept"
            engine.events.say("audit", f"{dropped}; `raysweep remake` makes another one again (candidates.keep)")
        with phase(engine, "audit"):
            engine.actors.audit_only()
            front = self.audit()
        self.incomplete += front.unplaced
        finalists = front.finalists(engine.sweep.audit.finalists)
        if finalists:
            with phase(engine, "attacks"):
                self.attack(front, finalists)
        front.audits = self.audits
        with phase(engine, "report"):
            write_front(engine.folder, front, engine.sweep)
            write_paired(engine.folder, self.context, self.audits["audit"], {t.trial: t.method for t in self.trials})
            engine.folder.update(incomplete=self.incomplete)  # for the report
            build(engine.folder)
        if engine.sweep.candidates.keep == "front" and not self.incomplete:  # what is missing may be audited again
            members = {row.trial for row in front.candidate_rows if row.on_front or row.trial == front.choice.trial}
            keep_only(engine.folder, engine.sweep, self.trials, members)
        return front

    def restore(self) -> None:
        """Makes picked candidates again that were dropped before their audit; one that comes out differently is not audited."""
        engine, (tier_name, tier) = self.engine, self.engine.sweep.audit.round(1)

        def is_needed(name: str) -> bool:
            audited = self.request(tier_name, tier, name).rows_path.is_file()
            return not audited and not stored.is_kept(engine.folder.candidates / name)

        dropped = [name for name in self.picked if is_needed(name)]
        if not dropped:
            return
        engine.events.say("prepare", f"dropped during the search, and made again: {', '.join(dropped)}")
        with engine.threads() as threads:
            futures = {
                name: threads.submit(remake, engine.executor, engine.sweep, self.context, self.picked[name])
                for name in dropped
            }
        for name, future in futures.items():
            try:
                problem = "" if future.result().is_same else future.result().difference
            except RunFailed as error:
                problem = f"{name}: was dropped during the search and could not be made again: {error}"
            if problem:
                self.incomplete.append(problem)
                engine.events.say("failed", problem)
                del self.picked[name]
        if not self.picked:
            raise RunFailed("; ".join(self.incomplete))

    def audit(self) -> Front:
        """Audits the picked candidates, and in further rounds, each on its own seeds, those whose standing is uncertain."""
        engine, context = self.engine, self.context
        rounds: list[dict[str, str]] = []
        front, names = None, list(self.picked)
        # contrastive audits are deterministic: repeating them would count the same evidence twice
        most = 1 if engine.task.model_kind == "contrastive" else engine.sweep.audit.rounds
        while names and len(rounds) < most:
            started, number = time.monotonic(), len(rounds) + 1
            tier_name, tier = engine.sweep.audit.round(number)
            subjects = "candidates" if number == 1 else "candidates whose place on the front is uncertain"
            anchors = "" if number == 1 else f", base, {len(context.oracles)} oracles and a destroyed model"
            engine.events.say("audit", f"{len(names)} {subjects}{anchors} on fresh seeds")
            running = Audits.start(engine, {n: self.request(tier_name, tier, n) for n in names})
            try:
                if number > 1:  # the anchors of the first round were measured before the search
                    _, views = context.load_anchors("audit")  # fixed before any candidate was judged
                    self.incomplete += measure_anchors(engine, context, tier_name, tier, views)
            except (RunFailed, Unmeasured) as error:
                self.incomplete.append(f"{tier_name}: {error}")  # the front of the earlier rounds remains
                engine.events.say("failed", f"{tier_name}: {error}")
                break
            keys, missing = running.collect()
            rounds.append(keys)
            self.audits[tier_name] = keys | {n: r.key for n, r in context.anchor_requests(tier_name, tier).items()}
            self.incomplete += missing
            required = requirements(engine.sweep, engine.task)
            front = audited_front(engine.folder, context, engine.task, rounds, self.trials, required)
            names = front.undecided
            engine.events.say("audit", f"done in {time.monotonic() - started:.0f} s")
        assert front is not None
        return front

    def attack(self, front: Front, finalists: list[str]) -> None:
        """Attacks the finalists, with base and oracles as controls, and enters the verdicts into the front.

        Finalists whose verdict more samples would decide are attacked once more, with as many as that takes.
        """
        self._attack(front, finalists, "durability", self.engine.sweep.audit.durability)
        for name in finalists:
            if name not in front.verdicts:
                front.gaps[name] = "the attacks on it failed"
            elif front.verdicts[name].label == "not tested":
                front.gaps[name] = "no attack gave a result on it"
        settings = self.engine.sweep.audit
        factors = {name: settings.repeat(front.verdicts[name].draws) for name in finalists if name in front.verdicts}
        again = {name: factor for name, factor in factors.items() if factor is not None}
        if again and self.engine.task.model_kind != "contrastive":  # whose attacks draw nothing
            self._attack(front, list(again), *settings.more_draws(max(again.values())))
        for name in finalists:
            if name in front.verdicts:
                self.engine.events.say("verdict", f"{name}  {front.verdicts[name].sentence()}")

    def _attack(self, front: Front, finalists: list[str], tier_name: str, tier: Tier) -> None:
        engine, context = self.engine, self.context
        started = time.monotonic()
        more = "" if tier_name == "durability" else ", undecided so far, on more samples"
        engine.events.say("attack", f"{', '.join(finalists)}{more}, base and {len(context.oracles)} oracles")
        requests = context.control_requests(tier_name, tier)
        requests |= {name: self.request(tier_name, tier, name) for name in finalists}
        keys, missing = Audits.start(engine, requests).collect()
        self.incomplete += missing
        self.audits[tier_name] = keys
        front.verdicts |= judged_by_attacks(engine.folder, context, self.audits["audit"], keys)
        engine.events.say("attack", f"done in {time.monotonic() - started:.0f} s")

    def request(self, tier_name: str, tier: Tier, name: str) -> AuditRequest:
        """The audit of a picked candidate."""
        t = self.picked[name]
        return self.context.request(
            tier_name, tier, name, t.method, str(self.engine.folder.candidates / name), t.digest
        )
