"""What is timed, one file a group of ops."""

from tutelx.bench.settings import GATES, OPS
from tutelx.bench.subject import Subject
from tutelx.bench.subjects import activation, experts, gate, gates, inference, layer, linear, route, rows

_ALL: tuple[Subject, ...] = (
    *linear.SUBJECTS,
    *gate.SUBJECTS,
    *route.SUBJECTS,
    *rows.SUBJECTS,
    *activation.SUBJECTS,
    *experts.SUBJECTS,
    *layer.SUBJECTS,
    *inference.SUBJECTS,
    *gates.SUBJECTS,
)
SUBJECTS: dict[str, Subject] = {subject.op: subject for subject in _ALL}
assert tuple(SUBJECTS) == OPS + GATES, f"settings.OPS + GATES={OPS + GATES} differ from the subjects {tuple(SUBJECTS)}"
