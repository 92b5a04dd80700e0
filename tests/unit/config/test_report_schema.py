"""Settings of `report`: what is refused before anything is read."""

from __future__ import annotations

import pytest

from retinaray.config.loading import load_from_argv
from retinaray.config.report_schema import ReportJob
from retinaray.errors import ConfigError


def test_report_job_takes_several_runs_and_has_a_default_for_everything_else() -> None:
    job = load_from_argv(ReportJob, ["first_run", "second_run", "--detect"])
    assert job.runs == ("first_run", "second_run")
    assert (job.output, job.detect, job.annotations) == ("report.html", True, None)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], r"runs \(argument RUN\): required"),
        (["a", "a"], "a: given more than once"),
        (["a", "--output", "page.pdf"], r"output=page.pdf .*ends in \.html"),
        (["a.html", "--output", "a.html"], "is also a run"),
        ([*"abcdefghi"], "1 to 8"),
        (["a", "--gallery", "-1"], "expected a whole number from 0 to 1000"),
        (["a", "--rule", "best"], "expected f1, precision=P"),
    ],
)
def test_report_job_refuses_what_cannot_be_meant(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_from_argv(ReportJob, argv)
