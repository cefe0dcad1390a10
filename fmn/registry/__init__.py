"""MLflow: merged models as registered versions, the champion among them, and their lineage."""

from fmn.registry.stages import register, roll_back

__all__ = ["register", "roll_back"]
