"""``skill.toml``: the settings of a skill folder."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class SkillSettings(BaseModel):
    """``skill.toml``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    description: str = ""
    licence: str = ""
    source: str = ""
    grader: str = "exact"
    grader_options: dict[str, Any] = {}
    max_new_tokens: int = Field(default=64, ge=1)
    system: str | None = None
    """Goes in front of rows without a system turn."""
    tools: tuple[dict[str, Any], ...] = ()
    """For rows without their own."""
    turns: Literal["last", "all"] = "last"
    """Which assistant turns of a conversation are demonstrations: the last one, or each of them after what came before
    it (those with ``"weight": 0`` left out)."""
    environment: str = ""
    """``python:module:factory`` of an Environment in which the model's own tool calls are carried out; a row is then a
    whole conversation."""
    environment_options: dict[str, Any] = {}
    max_turns: int = Field(default=8, ge=1)
    """Most assistant turns of a conversation that is played."""
    retention_budget: float | None = Field(default=None, gt=0, lt=0.5)
    """Accuracy that this skill may lose when later ones are learned, a share: 0.05 for 5 points; the workspace's budget
    where absent."""

    @model_validator(mode="after")
    def _played(self) -> SkillSettings:
        if not self.environment and (self.environment_options or self.max_turns != 8):
            raise ValueError("environment_options and max_turns have an effect only with an environment")
        if self.environment and self.turns == "all":
            raise ValueError('an environment plays whole conversations: leave turns = "all" out')
        return self

    @field_validator("retention_budget", mode="before")
    @classmethod
    def _share(cls, budget: Any) -> Any:
        if isinstance(budget, int | float) and budget >= 0.5:
            raise ValueError(f"a share below 0.5, such as 0.05 for 5 points, not {budget}")
        return budget

    @field_validator("name")
    @classmethod
    def _free(cls, name: str) -> str:
        if name == "probe":
            raise ValueError('"probe" is what the prior capabilities are called; choose another name')
        return name
