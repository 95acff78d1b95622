"Widgets over the same configurations: `panel(\"transformer\")`, `playground(model)`, `compare()`; for trees `ask(run)`, `replay(run)`; series: `series_panel(run)`."
from sprout_lab.panels.compare import compare
from sprout_lab.panels.panel import panel
from sprout_lab.panels.playground import playground
from sprout_lab.panels.series import series_panel
from sprout_lab.panels.tree import ask, replay

__all__ = ["ask", "compare", "panel", "playground", "replay", "series_panel"]
