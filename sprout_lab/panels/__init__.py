"Widgets over the same configurations: `panel(\"transformer\")`, `playground(model)`, `compare()`."
from sprout_lab.panels.compare import compare
from sprout_lab.panels.panel import panel
from sprout_lab.panels.playground import playground

__all__ = ["compare", "panel", "playground"]
