"""What Prometheus reads at /metrics.

Requests and times are counted here; tokens, cache and speculation are the engine's own counters, read when somebody
asks. prometheus_client's own histogram takes a lock for each observation, and there is one for every token: ours is
a list of counts that only the event loop touches.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from dsv3.engine.async_engine import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Seconds. A small model answers in a millisecond, a large one under load in minutes.
_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_WHOLE = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Histogram:
    """How often a value fell between which bounds; seconds here."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Prometheus counts what is at most each bound."""
        total, found = 0, []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


class Metrics(Collector):
    """The counters of one server, and the page that shows them."""

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        """stats: the engine's numbers, None while there is no engine."""
        self.time_to_first_token = Histogram(_FIRST)
        self.time_between_tokens = Histogram(_BETWEEN)
        self.request_duration = Histogram(_WHOLE)
        self.requests: Counter[tuple[str, int]] = Counter()
        """By endpoint and status."""
        self.active = 0
        self._stats = stats
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def page(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        http = CounterMetricFamily(
            "dsv3_http_requests", "Requests by endpoint and status.", labels=["endpoint", "status"]
        )
        for (endpoint, status), count in self.requests.items():
            http.add_metric([endpoint, str(status)], count)
        yield http
        yield GaugeMetricFamily("dsv3_http_active", "Requests under way.", value=self.active)
        for name, text, histogram in (
            ("time_to_first_token", "From the request to its first token.", self.time_to_first_token),
            ("time_between_tokens", "Between two tokens of an answer.", self.time_between_tokens),
            ("request_duration", "From the request to the end of its answer.", self.request_duration),
        ):
            family = HistogramMetricFamily(f"dsv3_{name}_seconds", text)
            family.add_metric([], histogram.buckets(), histogram.sum)
            yield family
        if (stats := self._stats()) is not None:
            yield from _engine(stats)


def _engine(stats: EngineStats) -> Iterator[Metric]:
    used = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
    hits = stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0
    accepted = stats.accepted_tokens / stats.drafted_tokens if stats.drafted_tokens else 0.0
    for name, text, gauge in (
        ("requests_waiting", "Answers that wait for a place.", stats.waiting),
        ("requests_running", "Answers being made.", stats.running),
        ("cache_blocks", "Blocks of the cache, 64 tokens each.", stats.blocks_total),
        ("cache_blocks_used", "Blocks that running answers hold.", stats.blocks_used),
        ("cache_usage_ratio", "Part of the cache that running answers hold.", used),
        ("prefix_cache_hit_ratio", "Part of all prompt tokens that the cache had.", hits),
        ("speculation_acceptance_ratio", "Part of all drafted tokens that were right.", accepted),
        ("speculating", "1 while tokens are drafted.", float(stats.speculating)),
    ):
        yield GaugeMetricFamily(f"dsv3_{name}", text, value=gauge)
    for name, text, counter in (
        ("prompt_tokens", "Tokens of prompts.", stats.prompt_tokens),
        ("cached_prompt_tokens", "Tokens of prompts that the cache had.", stats.cached_tokens),
        ("generated_tokens", "Tokens of answers.", stats.generated_tokens),
        ("preemptions", "Answers set back because the cache was full.", stats.preemptions),
        ("drafted_tokens", "Tokens that speculation proposed.", stats.drafted_tokens),
        ("accepted_tokens", "Of these, those that the model agreed with.", stats.accepted_tokens),
        ("engine_steps", "Forward passes.", stats.steps),
    ):
        yield CounterMetricFamily(f"dsv3_{name}", text, value=counter)
    if (experts := stats.experts) is not None:
        for name, text, number in (
            (
                "experts_in_memory",
                "Routed experts that a layer asked for and that were there.",
                experts.cached,
            ),
            ("experts_read_ahead", "Those that were read before a layer asked for them.", experts.foretold),
            ("experts_missing", "Those that a layer had to wait for.", experts.missed),
            ("expert_bytes_read", "Bytes of experts read from files.", experts.nbytes),
            ("expert_wait_seconds", "Seconds in which layers waited for experts.", experts.waited),
        ):
            yield CounterMetricFamily(f"dsv3_{name}", text, value=number)
    finished = CounterMetricFamily("dsv3_answers_finished", "Answers by what ended them.", labels=["reason"])
    for reason, count in stats.finished.items():
        finished.add_metric([reason], count)
    yield finished
