"""The embedded world, the default recipe's data. Start reading at `world.py`."""

from nurture.world.grading import Grade
from nurture.world.tasks import Task
from nurture.world.world import World, WorldConfig, WorldSize

__all__ = ["Grade", "Task", "World", "WorldConfig", "WorldSize"]
