"""A Ray cluster that exists: its nodes see the same files at the same places."""

from __future__ import annotations

import importlib
import ipaddress
import logging
import os
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from bulkedge import __version__
from bulkedge._errors import BulkedgeError, InputError, MissingExtraError, install
from bulkedge._fields import FLAG, TEXT, check_fields
from bulkedge._precision import one_thread
from bulkedge.auditing.inputs import Stamps, files_of, stamps
from bulkedge.auditing.matrix import audit_matrix
from bulkedge.comparison.plan import Comparison
from bulkedge.records.recipe import Recipe
from bulkedge.records.rows import Matrix

from ._order import largest_first

RETRIES = 5  # of a task whose node or worker was killed
TOKEN_MODE = ("RAY_AUTH_MODE", "token")


@dataclass(frozen=True)
class RayEngine:
    """Tasks on an existing Ray cluster, one CPU (or GPU) each; those of a killed node are retried.

    Anyone who reaches a Ray cluster without token authentication runs code on it, and what it sends
    back is unpickled here (CVE-2023-48022): addresses other than this machine's own loopback are
    refused unless ``RAY_AUTH_MODE=token`` is set.  bulkedge and torch must be the same versions on
    every node, and the inputs lie at the same paths with the same time of last change, as on a
    shared file system.

    Attributes:
        address: As ``ray.init`` takes it: ``host:port``, ``ray://host:port``, ``auto`` (the cluster
            that this machine belongs to) or ``local`` (one begun for this audit).
        insecure: Use a cluster that may not ask for a token.
    """

    address: str = "auto"
    insecure: bool = False

    def __post_init__(self) -> None:
        check_fields(self, address=TEXT, insecure=FLAG)

    @property
    def name(self) -> str:
        """``ray``."""
        return "ray"

    @property
    def jobs(self) -> int | None:
        """None: the cluster decides."""
        return None

    def check(self, recipe: Recipe) -> None:
        """Raise if this address or this device must not be used.

        Args:
            recipe: What is to be computed.

        Raises:
            InputError: If the address is not known to be safe, or the device has a number.
        """
        token = os.environ.get(TOKEN_MODE[0]) == TOKEN_MODE[1]
        if not (token or self.insecure or _on_loopback(self.address)):
            raise InputError(
                f"Ray address {self.address!r}: expected RAY_AUTH_MODE=token, since anyone who "
                "reaches a cluster without it runs code there and here; set it for the cluster and "
                "for this command, or accept the risk with --insecure-ray (insecure=True)"
            )
        if recipe.device.startswith("cuda:"):
            raise InputError(
                f"device {recipe.device!r}: a Ray cluster numbers its own; use device 'cuda'"
            )
        _import_ray()

    def rows(
        self, comparisons: Sequence[Comparison], recipe: Recipe
    ) -> Generator[tuple[int, Matrix]]:
        """Audit each matrix.

        Args:
            comparisons: What to audit.
            recipe: How.

        Yields:
            ``(position, row)`` as rows are finished.
        """
        self.check(recipe)
        if not comparisons:
            return
        ray = _import_ray()
        ours = not ray.is_initialized()
        if ours:
            _connect(ray, self.address)
        try:
            yield from _tasks(ray, comparisons, recipe)
        finally:
            if ours:  # ends this job's tasks, wherever they are
                ray.shutdown()


def _on_loopback(address: str) -> bool:
    """Whether an address is this machine's for certain; ``auto`` may lead anywhere."""
    if address == "local":
        return True
    host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _import_ray() -> Any:
    """The module, or what to install."""
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise MissingExtraError(
            f"the Ray engine needs ray, which is not installed: {install('ray')}"
        ) from None


def _connect(ray: Any, address: str) -> None:
    """Join the cluster, quietly."""
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        settings["include_dashboard"] = False
    try:
        ray.init(address=address, **settings)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"Ray address {address!r}: no cluster to join ({why}); check address and "
            "token, or start one with `ray start --head`"
        ) from None


def _tasks(
    ray: Any, comparisons: Sequence[Comparison], recipe: Recipe
) -> Generator[tuple[int, Matrix]]:
    """One task a matrix, the largest first."""
    gpus = 1 if recipe.device == "cuda" else 0
    if gpus and not ray.cluster_resources().get("GPU"):
        raise InputError("device 'cuda': the Ray cluster has no GPU; use device 'cpu'")
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES, scheduling_strategy="SPREAD")(
        audit_on_node
    )
    pending = {}
    for i in largest_first(comparisons):
        seen = stamps(files_of(comparisons[i]))
        pending[task.remote(comparisons[i], recipe, versions(), seen)] = i
    try:
        while pending:
            ray.wait(list(pending), num_returns=1)
            # all that are there: one look for each would cost the square of the number of tasks
            finished, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0)
            for reference in finished:
                i = pending.pop(reference)
                yield i, _receive(ray, reference, comparisons[i])
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)


def _receive(ray: Any, reference: Any, comparison: Comparison) -> Matrix:
    """The row of a finished task."""
    name = comparison.base.name
    try:
        problem, row = ray.get(reference)
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines() or [""]
        raise BulkedgeError(
            f"the Ray task on tensor {name!r} failed ({type(error).__name__}: {lines[-1]}); the "
            f"matrices of a killed node are tried again {RETRIES} times"
        ) from error
    if problem:
        raise BulkedgeError(f"the Ray task on tensor {name!r} was not started: {problem}")
    return Matrix.model_validate(row)


# ---- on a node


def versions() -> dict[str, str]:
    """What must be the same everywhere for a row to be the same, rounding aside."""
    import torch

    return {"bulkedge": __version__, "torch": torch.__version__}


def audit_on_node(
    comparison: Comparison, recipe: Recipe, expected: Mapping[str, str], seen: Stamps
) -> tuple[str, dict[str, Any] | None]:
    """A row as plain values, or why this node must not compute it.

    Args:
        comparison: What to audit.
        recipe: How.
        expected: The versions of the process that asks.
        seen: Size and time of change of the files as it saw them.

    Returns:
        ``("", row)``, or ``(problem, None)``.
    """
    if (own := versions()) != dict(expected):
        return f"{_node()} has {own}, expected {dict(expected)}; install the same there", None
    for file, stamp in stamps(seen).items():
        if stamp != seen[file]:
            what = "lacks" if stamp is None else "has another"
            return f"{_node()} {what} {file}; let all nodes see one file system", None
    with one_thread():
        return "", audit_matrix(comparison, recipe).model_dump()


def _node() -> str:
    return f"node {os.uname().nodename if hasattr(os, 'uname') else '?'}"
