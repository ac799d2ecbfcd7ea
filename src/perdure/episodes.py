"""Conversations that the model plays itself: its own calls, and the results that they have in an environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from perdure.contexts import Renderer
from perdure.processes import GROUP
from perdure.rollout.base import Progress, RolloutEngine, SamplingParams
from perdure.skills.environments import Acting, Environment
from perdure.skills.graders.tool_call import calls_in
from perdure.templates import Template
from perdure.types import Completion, Example, InputError, Message, Prompt

NO_CALL = "Error: this is no call that can be read."
"""The result of a call that is written wrongly."""


@dataclass
class Episode:
    """One conversation, turn by turn."""

    example: Example
    world: Environment
    turns: list[tuple[Example, Completion]] = field(default_factory=list)
    """Each assistant turn, with the conversation before it as the example's messages."""
    messages: tuple[Message, ...] = ()
    """The conversation so far."""
    open: bool = True


def play(engine: RolloutEngine, renderer: Renderer, examples: Sequence[Example], acting: Acting, params: SamplingParams,
         seeds: Callable[[int, int], int], template: Template | None = None, progress: Progress | None = None,
         scored_by: Template | None = None) -> list[Episode]:  # fmt: skip
    """Let the model act from each example's prompt until it makes no more calls, as the teacher where there is a
    ``template``. ``seeds``: of (place of the example, number of the turn).

    A conversation ends, too, after ``acting.max_turns``, at an answer cut off by the length limit, and where the next
    turn would not fit the window, also not for a teacher who is to score it under ``scored_by``.
    Raises InputError when the environment fails, or with several processes."""
    if GROUP.count > 1:
        raise InputError("an environment is played in one process: start the command without torchrun")
    episodes = [Episode(example, acting.begin(example), messages=example.messages) for example in examples]
    for number in range(acting.max_turns):
        asked = _prompts(renderer, episodes, params.max_new_tokens, template, scored_by, number)
        references = [_recorded(renderer, episodes[place].example, number) for place in asked]
        completions = engine.generate(list(asked.values()), params, [seeds(place, number) for place in asked], None,
                                      references) if asked else []  # fmt: skip
        for (place, prompt), completion in zip(asked.items(), completions, strict=True):
            episodes[place].turns.append((prompt.example, completion))
            _answer(episodes[place], renderer, completion, acting)
        if progress:
            progress(sum(len(c.token_ids) for c in completions), sum(not episode.open for episode in episodes))
    return episodes


def _prompts(renderer: Renderer, episodes: Sequence[Episode], most: int, template: Template | None,
             scored_by: Template | None, number: int) -> dict[int, Prompt]:  # fmt: skip
    """Place -> prompt of the next turn, of every conversation that goes on; those that have grown too long end."""
    found = {}
    for place, episode in enumerate(episodes):
        if not episode.open:
            continue
        now = replace(episode.example, messages=episode.messages)
        prompt = renderer.teacher_prompt(now, template) if template else renderer.student_prompt(now)
        scored = renderer.teacher_prompt(now, scored_by) if scored_by else prompt
        longest = max(len(prompt.token_ids), len(scored.token_ids))
        episode.open = not number or longest + most <= renderer.window
        if episode.open:
            renderer.check_window(prompt, most, "acting")
            found[place] = prompt
    return found


def _recorded(renderer: Renderer, example: Example, number: int) -> Sequence[int]:
    """What the recorded conversation says in its turn ``number``: a guess at the model's."""
    turns = renderer.recorded_turns(example)
    return renderer.demonstration(turns[number]).token_ids if number < len(turns) else ()


def _answer(episode: Episode, renderer: Renderer, completion: Completion, acting: Acting) -> None:
    """The environment's part after an assistant turn."""
    text = renderer.text(completion)
    calls = calls_in(renderer.answer(completion)) if completion.finished else []
    episode.open = bool(calls)
    if not calls:
        episode.messages = (*episode.messages, {"role": "assistant", "content": text})
        return
    readable = [{"name": name, "arguments": arguments} for name, arguments in calls if name]
    results = iter(acting.results(episode.world, readable, episode.example) if readable else ())
    said = [next(results) if name else NO_CALL for name, _ in calls]
    episode.messages = (*episode.messages, {"role": "assistant", "content": text},
                        *({"role": "tool", "content": result} for result in said))  # fmt: skip


def transcript(episode: Episode) -> str:
    """The conversation after its prompt, for reading."""
    lines = (f"[{m['role']}] {m['content']}" for m in episode.messages[len(episode.example.messages) :])
    return "\n".join(lines)
