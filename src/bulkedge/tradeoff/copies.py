"""The copies of a fine-tune: written as a repair writes them, from one audit of the input."""

from __future__ import annotations

import shutil
from functools import cached_property
from pathlib import Path

from bulkedge._errors import CheckpointError, InputError, OutputError, count
from bulkedge._repair import check_output, record_of
from bulkedge.auditing import LocalEngine, Progress, run_plan
from bulkedge.checkpoint.write import new_folder
from bulkedge.comparison import Plan
from bulkedge.moments import Moments
from bulkedge.records import Recipe, Record
from bulkedge.repairing import RepairRecord
from bulkedge.repairing.choose import work_for
from bulkedge.repairing.inputs import Known
from bulkedge.repairing.output import Output
from bulkedge.repairing.work import Options, Work

from .folder import Folder
from .points import Files, Point, method_of


class Copies:
    """The copies of one fine-tune in one folder.

    Args:
        plan: Both inputs.
        recipe: Of the audit of the input.
        files: The inputs as they were given.
        folder: Where the copies go.
        jobs: Worker processes of the audit.
        progress: Called after each matrix of the audit.

    Raises:
        CheckpointError: If a file of moments cannot be read.
    """

    def __init__(
        self,
        plan: Plan,
        recipe: Recipe,
        files: Files,
        folder: Folder,
        jobs: int,
        progress: Progress | None,
    ) -> None:
        self.plan, self.recipe, self.files, self.folder = plan, recipe, files, folder
        self.jobs, self.progress = jobs, progress
        self.moments = Moments.load(files.moments)
        task = files.task_moments
        self.task_moments = None if task is None else Moments.load(task)

    def check(self, points: list[Point]) -> None:
        """Raise where a point cannot be made, before hours of evaluations.

        Args:
            points: All of them.

        Raises:
            InputError: If the moments are of another model, or the fine-tune keeps no scale.
        """
        for arm in ("scaled", "protected"):
            self._work(next(point for point in points if point.arm == arm))
        known = Known(self.plan, self.moments, self.task_moments)
        errors = []
        for comparison in self.plan.comparisons:
            try:
                known.of(comparison)
            except InputError as error:
                errors.append(error)
            else:
                return  # the others that are not known are refused by name, and listed
        if errors:
            raise errors[0]

    def check_room(self, points: list[Point]) -> None:
        """Raise where the copies that are still to be written would not fit.

        Args:
            points: All of them.

        Raises:
            OutputError: If so.
        """
        left = [point for point in points if point.is_copy and not self._path(point).exists()]
        if not left:
            return
        check_output(self._path(left[0]), self.plan)
        free = shutil.disk_usage(self.folder.path).free
        needed = len(left) * sum(file.stat().st_size for file in self.plan.tuned.files)
        if free < needed:
            raise OutputError(
                f"{self.folder.path}: {free} bytes free, {count(len(left), 'copy', 'copies')} need "
                f"{needed}; make room, or ask for fewer strengths"
            )

    def make(self, point: Point) -> RepairRecord:
        """The copy of a point, written unless it is there.

        Args:
            point: Which.

        Returns:
            What was done to it: its ``repair.json``, with the audit of the input alone.

        Raises:
            InputError: If no update could be changed.
            OutputError: If it cannot be written, or what is there was not written here.
        """
        path = self._path(point)
        if path.exists():
            return self._there(path)
        work = self._work(point)
        todo = work.affected(self._audit, ())
        with new_folder(path) as folder:
            output = Output.copy(self.plan.tuned, folder)
            (folder / RepairRecord.file_name).unlink(missing_ok=True)  # of an earlier repair
            work.treat(todo, output, None)
            record = record_of(work, self._audit, None, path, output.left_behind)
            if all(row.status == "refused" for row in record.matrices):
                why = record.matrices[0].note if record.matrices else "it equals its base"
                raise InputError(f"{self.plan.tuned.path}: no update can be {point.arm}: {why}")
            (folder / RepairRecord.file_name).write_text(record.to_json(), encoding="utf-8")
        return record

    def model(self, point: Point) -> Path:
        """The path of the model to be evaluated."""
        if point.arm == "base":
            return self.files.base
        if point.arm == "trained":
            return self.files.tuned
        path = self._path(point)
        tuned = self.plan.tuned.path  # a file stays a file
        alone = tuned.is_file() and not tuned.name.endswith(".index.json")
        return path / tuned.name if alone else path

    @cached_property
    def _audit(self) -> Record:
        """The audit of the input, once for all copies."""
        journal = self.folder.audit_journal
        return run_plan(
            self.plan,
            self.recipe,
            engine=LocalEngine(self.jobs),
            journal=journal,
            resume=journal.exists(),
            progress=self.progress,
        )

    def _work(self, point: Point) -> Work:
        method = method_of(point, self.moments, self.task_moments, self.files.balance)
        return work_for(self.plan, self.recipe, method, Options())

    def _path(self, point: Point) -> Path:
        return self.folder.path / point.name

    def _there(self, path: Path) -> RepairRecord:
        """What was done to a copy that is there: folders get their names when they are whole."""
        try:
            return RepairRecord.from_json(path / RepairRecord.file_name)
        except CheckpointError:
            raise OutputError(
                f"{path}: exists without the {RepairRecord.file_name} of a copy; remove it"
            ) from None
