"""The status as metrics, in the text format of Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from blockd.web.status import DeviceStatus, Operations, Status

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Family = CounterMetricFamily | GaugeMetricFamily | InfoMetricFamily


def metrics_of(status: Status) -> bytes:
    """Write the metrics of one moment."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Metrics(status))
    return generate_latest(registry)


class _Metrics(Collector):
    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Family]:
        status = self._status
        yield InfoMetricFamily("blockd", "The daemon.", {"version": status.version})
        yield GaugeMetricFamily("blockd_uptime_seconds", "How long it runs.", status.uptime_seconds)
        connections = status.nbd.connections if status.nbd is not None else 0
        yield GaugeMetricFamily("blockd_nbd_connections", "NBD clients that are connected.", connections)
        jobs = GaugeMetricFamily("blockd_jobs", "Jobs that are not dismissed.", labels=["type", "status"])
        for kind in sorted({(job.type, job.status) for job in status.jobs}):
            jobs.add_metric(list(kind), sum((job.type, job.status) == kind for job in status.jobs))
        yield jobs
        named = [(device.name or device.node_name, device) for device in status.devices]
        yield from _guest_metrics(named)
        yield from _stream_metrics(named)


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
