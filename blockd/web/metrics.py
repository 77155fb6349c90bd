"""The status as metrics, in the text format of Prometheus."""

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from blockd.aio import Turns
from blockd.web.status import DeviceStatus, Operations, Status

# How many disks are written about at a time.
DEVICE_COUNT = 8
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Family = CounterMetricFamily | GaugeMetricFamily | InfoMetricFamily


async def metrics_of(status: Status) -> bytes:
    """Write the metrics of one moment, some disks at a time."""
    named = [(device.name or device.node_name, device) for device in status.devices]
    # Of each family what it is, and then its samples.
    texts = {family.name: [_text(family)] for family in _daemon_metrics(status)}
    turns = Turns()
    for start in range(0, max(len(named), 1), DEVICE_COUNT):
        await turns.pass_on()
        some = named[start : start + DEVICE_COUNT]
        for family in [*_guest_metrics(some), *_stream_metrics(some)]:
            text = _text(family)
            texts.setdefault(family.name, []).append(text if start == 0 else _samples(text))
    return b"".join(part for parts in texts.values() for part in parts)


class _One(Collector):
    def __init__(self, family: Family) -> None:
        self._family = family

    def collect(self) -> Iterator[Family]:
        yield self._family


def _text(family: Family) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_One(family))
    return generate_latest(registry)


def _samples(text: bytes) -> bytes:
    return b"".join(line for line in text.splitlines(keepends=True) if not line.startswith(b"#"))


def _daemon_metrics(status: Status) -> Iterator[Family]:
    yield InfoMetricFamily("blockd", "The daemon.", {"version": status.version})
    yield GaugeMetricFamily("blockd_uptime_seconds", "How long it runs.", status.uptime_seconds)
    connections = status.nbd.connections if status.nbd is not None else 0
    yield GaugeMetricFamily("blockd_nbd_connections", "NBD clients that are connected.", connections)
    jobs = GaugeMetricFamily("blockd_jobs", "Jobs that are not dismissed.", labels=["type", "status"])
    counts = Counter((job.type, job.status) for job in status.jobs)
    for (job_type, job_status), count in sorted(counts.items()):
        jobs.add_metric([job_type, job_status], count)
    yield jobs


def _guest_metrics(devices: list[tuple[str, DeviceStatus]]) -> Iterator[Family]:
    labels = ["device", "operation"]
    count = CounterMetricFamily("blockd_guest_requests", "Requests of guests that succeeded.", labels=labels)
    byte_count = CounterMetricFamily("blockd_guest_bytes", "Bytes of these.", labels=labels)
    seconds = CounterMetricFamily("blockd_guest_seconds", "Time that these took.", labels=labels)
    failed = CounterMetricFamily("blockd_guest_failed_requests", "Requests that failed.", labels=labels)
    for name, device in devices:
        for operation in ("read", "write", "discard", "flush"):
            done: Operations = getattr(device.guest, operation)
            count.add_metric([name, operation], done.count)
            byte_count.add_metric([name, operation], done.byte_count)
            seconds.add_metric([name, operation], done.seconds)
            failed.add_metric([name, operation], done.failed)
    yield from (count, byte_count, seconds, failed)


def _stream_metrics(devices: list[tuple[str, DeviceStatus]]) -> Iterator[Family]:
    """Of the streams that run; a gauge each, for they begin and end."""
    shown = {
        "length": "What a stream has to go through.",
        "offset": "How far it is.",
        "copied": "What it has copied.",
        "rate": "What it copies per second.",
        "leeway": "What it copies at once, at most.",
    }
    for name, text in shown.items():
        family = GaugeMetricFamily(f"blockd_stream_{name}_bytes", text, labels=["device"])
        for device_name, device in devices:
            if device.stream is not None:
                family.add_metric([device_name], getattr(device.stream, name))
        yield family
