"""Usage reports: usage by time and group, in any time zone, as JSON or CSV."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Sequence
from typing import Annotated, Literal, get_args
from zoneinfo import available_timezones

from fastapi import Query
from fastapi.responses import Response
from pydantic import AfterValidator

import db
from common.errors import BadRequest
from common.money import in_credits
from db_rows.books import ReportRange, ReportRow
from gateway.runtime.instance import Runtime
from routes.http.export import csv_answer
from routes.http.responses import success, utc_now

MAX_ROWS = 10_000
MAX_DAYS = 3660
FAR = datetime.datetime(9999, 1, 1, tzinfo=datetime.UTC)
SLOT = datetime.timedelta(minutes=15)

Bucket = Literal["hour", "day", "month", "none"]
Group = Literal[
    "model", "key", "provider", "environment", "endpoint", "status", "error_code", "end_user", "none"
]
AdminGroup = Literal[
    "model", "key", "provider", "environment", "endpoint", "status", "error_code", "user", "end_user", "none"
]
Format = Literal["json", "csv"]
Summed = Literal[
    "requests",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "reasoning_tokens",
    "cost_nanos",
    "upstream_cost_nanos",
    "overrun_nanos",
]
SUMMED: tuple[Summed, ...] = get_args(Summed)


@functools.cache
def _zones() -> frozenset[str]:
    """The zones that PostgreSQL knows as well. Cached, since finding them reads hundreds of files."""
    return frozenset(available_timezones()) - {"localtime"}


def _zone(name: str) -> str:
    if name != "UTC" and name not in _zones():
        raise ValueError("is no time zone (an IANA name such as Europe/Berlin)")
    return name


Zone = Annotated[str, Query(max_length=64, description="IANA name"), AfterValidator(_zone)]
ABOUT_LATENCY = (
    "Latencies are counted in buckets (up to 25, 50, 100, 150, 200, 300, ... ms). So the percentiles "
    "(`latency_p50_ms`, `latency_p95_ms`, `latency_p99_ms`) are estimates within a bucket, and may be off by "
    "its width; the average is not, and neither are the usage records."
)
COLUMNS = (
    "bucket",
    "group",
    "requests",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "reasoning_tokens",
    "cost",
    "upstream_cost",
    "overrun",
    "latency_average_ms",
    "latency_p50_ms",
    "latency_p95_ms",
    "latency_p99_ms",
)


def read_range(
    start: datetime.datetime | None, end: datetime.datetime | None
) -> tuple[datetime.datetime, datetime.datetime]:
    """The range, widened to quarters of an hour, which is how usage is summed up; by default the last 30
    days. Raises BadRequest.
    """
    until = _round_up(min(end or utc_now(), FAR))
    since = (start or until - datetime.timedelta(days=30)).astimezone(datetime.UTC)
    since -= datetime.timedelta(
        minutes=since.minute % 15, seconds=since.second, microseconds=since.microsecond
    )
    if since >= until:
        raise BadRequest("`end` must be after `start`.", param="end")
    if until - since > datetime.timedelta(days=MAX_DAYS):
        raise BadRequest("The range is longer than ten years.", param="start")
    return since, until


def _round_up(moment: datetime.datetime) -> datetime.datetime:
    moment = moment.astimezone(datetime.UTC)
    over = datetime.timedelta(
        minutes=moment.minute % 15, seconds=moment.second, microseconds=moment.microsecond
    )
    return moment - over + (SLOT if over else datetime.timedelta())


async def usage_report(
    runtime: Runtime,
    *,
    user_id: int | None,
    start: datetime.datetime | None,
    end: datetime.datetime | None,
    zone: str,
    bucket: Bucket,
    group: AdminGroup,
    form: Format,
) -> Response:
    """The report as a response. Raises BadRequest for a range or a size that is not served."""
    since, until = read_range(start, end)
    spans: ReportRange = {
        "start": since.isoformat(),
        "end": until.isoformat(),
        "zone": zone,
        "bucket": bucket,
        "limit": MAX_ROWS + 1,  # one more than is served: it shows that there are more
    }
    groups = await _read_rows(runtime, user_id, group, spans)
    rows = [_row(row) for row in groups]
    if form == "csv":
        return csv_answer(COLUMNS, rows, "usage.csv")
    summary = {"start": since, "end": until, "timezone": zone, "bucket": bucket, "group_by": group}
    return success(**summary, total=_total(groups), rows=rows)


async def _read_rows(
    runtime: Runtime, user_id: int | None, group: AdminGroup, report: ReportRange
) -> list[ReportRow]:
    if group != "end_user":
        rows = await db.report_usage(runtime.client, user_id=user_id, report=report, group=group)
    elif user_id is None:
        raise BadRequest("`user_id` is missing: end users are one user's.", param="user_id")
    else:
        rows = await db.report_end_users(runtime.client, user_id=user_id, report=report)
    if len(rows) > MAX_ROWS:
        message = f"The report has more than {MAX_ROWS} rows. Take a shorter range or a larger bucket."
        raise BadRequest(message, param="bucket")
    return rows


def _row(row: ReportRow) -> dict[str, object]:
    requests = row["requests"]
    average = round(row["latency_ms_total"] / requests) if requests else None
    # Every percentile of a single request is known exactly, not only its bucket.
    latencies = dict.fromkeys(
        (name for name in COLUMNS if name.startswith("latency") and requests == 1), average
    )
    cells = {**in_credits(row), "latency_average_ms": average, **latencies}
    return {name: cells.get(name) for name in COLUMNS}


def _total(rows: Sequence[ReportRow]) -> dict[str, object]:
    return in_credits({name: sum(row[name] for row in rows) for name in SUMMED})
