"""All that a person looks at: the panel, its controls and its charts."""

from widgets.figures import panel_figure, run_figure
from widgets.workbench import Workbench

__all__ = ["Workbench", "panel_figure", "run_figure"]
