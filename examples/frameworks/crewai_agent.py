"""A CrewAI crew whose agent has E2B's tools: pip install 'crewai-tools[e2b]'; the server has a domain (`kelvin serve --domain`)
and the template of the code interpreter, E2B_DOMAIN and E2B_API_KEY are set.

By name, because CrewAI holds E2B's clients at versions (2.20 and 2.6) whose `run_code` knows no E2B_SANDBOX_URL.

No model: `Canned` gives the replies that a model would, through CrewAI's interface for models of one's own.
"""

import json
import os

os.environ.setdefault("CREWAI_DISABLE_TELEMETRY", "true")
os.environ.setdefault("OTEL_SDK_DISABLED", "true")
os.environ.setdefault("CREWAI_TRACING_ENABLED", "false")

from crewai import Agent, BaseLLM, Crew, Task  # noqa: E402
from crewai_tools import E2BExecTool, E2BFileTool, E2BPythonTool  # noqa: E402
from pydantic import PrivateAttr  # noqa: E402


def act(tool, **arguments):
    return f"Thought: a tool is needed\nAction: {tool}\nAction Input: {json.dumps(arguments)}"


REPLIES = [
    act("e2b_sandbox_python", code="scores = [9, 7]\nprint('kept')"),
    act("e2b_sandbox_python", code="sum(scores)"),
    act("e2b_sandbox_python", code="1 / 0"),
    act("e2b_sandbox_files", action="write", path="/home/user/scores.txt", content="9\n7\n"),
    act("e2b_sandbox_files", action="read", path="/home/user/scores.txt"),
    act("e2b_sandbox_exec", command="echo $((9 + 7)) > sum.txt; wc -l < sum.txt; cat sum.txt"),
    "Thought: I now know the final answer\nFinal Answer: The sum is 16.",
]


class Canned(BaseLLM):
    """Replies in their order, whatever is asked."""

    _replies: list = PrivateAttr(default_factory=lambda: list(REPLIES))
    _asked: list = PrivateAttr(default_factory=list)

    def call(self, messages, *args, **kwargs):
        self._asked.append("\n".join(str(message["content"]) for message in messages))
        return self._replies.pop(0)


model = Canned(model="canned/canned")
# A persistent tool keeps its sandbox from call to call; another makes one for each.
options = {"sandbox_timeout": 120, "metadata": {"example": "crewai"}}
tools = [
    E2BPythonTool(persistent=True, **options),
    E2BFileTool(persistent=True, template="base", **options),
    E2BExecTool(template="base", **options),
]
analyst = Agent(role="Analyst", goal="Sum up scores", backstory="You run code.", llm=model, tools=tools)
task = Task(description="What is the sum of the scores 9 and 7?", expected_output="The sum.", agent=analyst)
try:
    answer = Crew(agents=[analyst], tasks=[task]).kickoff()
finally:
    for tool in tools:
        tool.close()

assert answer.raw == "The sum is 16.", answer.raw
# What each tool call added to what the model was told.
asked = model._asked
state, total, error, _, read, shell = (now.removeprefix(before) for before, now in zip(asked, asked[1:]))
assert "kept" in state, "what a cell printed came back"
assert "'text': '16'" in total, "the second cell saw the variables of the first"
assert "ZeroDivisionError" in error
assert "9\\n7\\n" in read, "the file was there in the next call"
assert "'exit_code': 0" in shell and "1\\n16\\n" in shell, shell
print(answer.raw)
