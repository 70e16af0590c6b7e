"""OpenHands' CodeAct agent with its E2B runtime: pip install 'openhands-ai==1.6.0' e2b-code-interpreter, on Python 3.12 or
3.13; E2B_API_URL, E2B_SANDBOX_URL and E2B_API_KEY are set, and the server has the template of the code interpreter.

1.6.0 is the last version that has this runtime: from 1.7 on OpenHands has no E2B integration of its own.

No model: `Canned` gives the tool calls that a model would make, through LiteLLM's interface for providers of one's own,
which is what OpenHands asks its models through.
"""

import asyncio
import json
import os
import tempfile

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("LOG_LEVEL", "WARNING")

import litellm  # noqa: E402
from openhands.core.config import AgentConfig, LLMConfig, OpenHandsConfig, SandboxConfig  # noqa: E402
from openhands.core.main import run_controller  # noqa: E402
from openhands.core.schema import AgentState  # noqa: E402
from openhands.core.setup import create_agent, create_runtime, generate_sid  # noqa: E402
from openhands.events.action import MessageAction  # noqa: E402
from openhands.events.observation import CmdOutputObservation, ErrorObservation, IPythonRunCellObservation  # noqa: E402
from openhands.utils.utils import create_registry_and_conversation_stats  # noqa: E402

SAFE = {"security_risk": "LOW"}
REPLIES = [
    ("execute_bash", {"command": "printf '9\\n7\\n' > /tmp/scores && wc -l < /tmp/scores", **SAFE}),
    ("execute_ipython_cell", {"code": "total = sum(int(line) for line in open('/tmp/scores'))\ntotal", **SAFE}),
    ("execute_ipython_cell", {"code": "total / 0", **SAFE}),
    ("execute_bash", {"command": "echo $E2B_SANDBOX_ID; exit 3", **SAFE}),
    ("finish", {"message": "The sum is 16."}),
]


class Canned(litellm.CustomLLM):
    """Replies in their order, whatever is asked."""

    def __init__(self):
        super().__init__()
        self.replies = iter(REPLIES)

    def completion(self, *args, **kwargs):
        name, arguments = next(self.replies)
        call = {"id": f"call-{name}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        return litellm.ModelResponse(model="canned", choices=[{"finish_reason": "tool_calls", "message": message}])


async def main():
    litellm.custom_provider_map = [{"provider": "canned", "custom_handler": Canned()}]
    with tempfile.TemporaryDirectory() as directory:
        config = OpenHandsConfig(
            runtime="e2b",
            max_iterations=10,
            file_store="memory",
            file_store_path=directory,
            sandbox=SandboxConfig(timeout=60),
            enable_browser=False,
        )
        config.set_llm_config(LLMConfig(model="canned/canned", native_tool_calling=True, num_retries=0))
        config.set_agent_config(AgentConfig(enable_mcp=False, enable_browsing=False, enable_prompt_extensions=False))
        sid = generate_sid(config)
        registry, _, config = create_registry_and_conversation_stats(config, sid, None)
        runtime = create_runtime(config, registry, sid=sid, agent=create_agent(config, registry))
        await runtime.connect()
        sandbox = runtime.sandbox.sandbox
        try:
            state = await run_controller(config, MessageAction(content="Sum up 9 and 7."), sid=sid, runtime=runtime)
        finally:
            sandbox.kill()
    assert state.agent_state == AgentState.FINISHED, (state.agent_state, state.last_error)
    kinds = (CmdOutputObservation, IPythonRunCellObservation, ErrorObservation)
    seen = [event for event in state.history if isinstance(event, kinds)]
    for event in seen:
        print(type(event).__name__, repr(event.content))
    count, total, error, shell = seen
    assert (count.exit_code, count.content.strip()) == (0, "2")
    assert total.content.strip() == "16"
    assert "ZeroDivisionError" in error.content
    assert "status 3" in shell.content or "code 3" in shell.content, shell.content
    assert not sandbox.is_running()


asyncio.run(main())
