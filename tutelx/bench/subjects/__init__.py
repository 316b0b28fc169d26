"""What is timed, one file a group of ops."""

from tutelx.bench.settings import OPS
from tutelx.bench.subject import Subject
from tutelx.bench.subjects import activation, experts, gate, layer, route, rows

_ALL: tuple[Subject, ...] = (
    *gate.SUBJECTS,
    *route.SUBJECTS,
    *rows.SUBJECTS,
    *activation.SUBJECTS,
    *experts.SUBJECTS,
    *layer.SUBJECTS,
)
SUBJECTS: dict[str, Subject] = {subject.op: subject for subject in _ALL}
assert tuple(SUBJECTS) == OPS, f"settings.OPS={OPS} differs from the subjects {tuple(SUBJECTS)}"
