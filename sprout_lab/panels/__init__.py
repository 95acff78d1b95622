"Widgets over the same configurations: `panel(\"transformer\")`, `playground(model)`, `compare()`; for trees `ask(run)` and `replay(run)`."
from sprout_lab.panels.compare import compare
from sprout_lab.panels.panel import panel
from sprout_lab.panels.playground import playground
from sprout_lab.panels.tree import ask, replay

__all__ = ["ask", "compare", "panel", "playground", "replay"]
