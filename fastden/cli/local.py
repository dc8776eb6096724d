"""``fastden denoise`` of images on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastden.batch.denoiser import BatchDenoiser
from fastden.batch.dry_run import rehearse
from fastden.batch.manifest import has_earlier, has_manifest, made_before
from fastden.batch.plan import Job, plan
from fastden.batch.report import Interrupted, Listener
from fastden.cli.console import ExistingOutputs, clean_termination, duration, error_line, say, size_of
from fastden.cli.display import Display
from fastden.cli.options import Request, check_model, naming
from fastden.errors import in_one_line
from fastden.images.finder import left_out_note


def denoise_here(request: Request, *, dry_run: bool) -> int:
    """Denoise image files, or say what would be done; the exit code."""
    output = Path(request.output)
    unreadable: list[OSError] = []
    left_out: list[Path] = []
    jobs = plan(
        request.inputs,
        request.output,
        recursive=request.recursive,
        format_name=request.format_name,
        unreadable=unreadable,
        made=made_before(request.manifest, output) if request.resume else None,
        left_out=left_out,
    )
    # A wrong model, device, sigma or memory limit concerns all files: one message, before the first file.
    check_model(request.settings)
    with naming():
        batch = BatchDenoiser(**request.settings)
    request.note_sigma()
    if dry_run:
        code = _rehearse(batch, request, jobs, unreadable)
    else:
        with clean_termination():
            code = _run(batch, request, jobs, unreadable)
    if left_out:
        say(f"note: {left_out_note(left_out)}", error=True)
    return code


def _run(batch: BatchDenoiser, request: Request, jobs: list[Job], unreadable: Sequence[OSError]) -> int:
    interrupted = False
    display = Display(len(jobs), unreadable, earlier=_has_earlier(request, jobs))
    listener = Listener(
        record=lambda job, record: display.record(job.source, job.target, record),
        progress=lambda ended, part: display.progress(ended + part),
        note=display.note,
    )
    with display:
        try:
            report = batch.run_jobs(
                jobs, Path(request.output), manifest=request.manifest, resume=request.resume, listener=listener
            )
        except Interrupted as error:
            report, interrupted = error.report, True
    resumable = has_manifest(request.manifest, jobs, Path(request.output))
    return display.summary(report, interrupted=interrupted, resumable=resumable)


def _has_earlier(request: Request, jobs: list[Job]) -> bool:
    """Whether there is an earlier run that this one could resume, and does not."""
    return not request.resume and has_earlier(request.manifest, jobs, Path(request.output))


def _rehearse(batch: BatchDenoiser, request: Request, jobs: list[Job], unreadable: Sequence[OSError]) -> int:
    """Print what :func:`_run` would do; nothing is written."""
    expected = rehearse(batch, jobs, Path(request.output), manifest=request.manifest, resume=request.resume)
    for error in unreadable:
        say(f"error: {in_one_line(error)}", error=True)
    existing = ExistingOutputs(several=len(jobs) + len(unreadable) > 1, resumable=_has_earlier(request, jobs))
    for step in expected.steps:
        if step.error is not None:
            say(error_line(step.job.source, step.job.target, existing.shortened(step.error)), error=True)
        elif step.done:
            say(f"{step.job.target}: done before")
        else:
            how = ", streamed" if step.streamed else ""
            say(f"{step.job.source} -> {step.job.target}, {size_of(step)}, {step.sigma}{how}")
    existing.say()
    todo = sum(step.error is None and not step.done for step in expected.steps)
    if todo:
        time = f"about {duration(expected.seconds)} at {expected.rate:.2f} MP/s, measured now"
        memory = f"at most {expected.memory / 2**30:.2f} GiB beside Python and PyTorch"
        say(f"would denoise {todo} image{'s' * (todo != 1)}, {expected.megapixels:.2f} megapixels: {time}; {memory}")
    return 1 if unreadable or any(step.error is not None for step in expected.steps) else 0
