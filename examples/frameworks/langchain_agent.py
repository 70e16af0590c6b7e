"""A LangChain deep agent whose files and shell are a sandbox's: pip install langchain-e2b; E2B_API_URL, E2B_SANDBOX_URL and
E2B_API_KEY are set.

No model: `Canned` gives the tool calls that a model would make, through LangChain's interface for chat models.
"""

from deepagents import create_deep_agent
from e2b import Sandbox
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, ToolMessage
from langchain_e2b import E2BSandbox

PROGRAM = "import csv\nprint(sum(int(row['score']) for row in csv.DictReader(open('/home/user/data.csv'))))\n"


def call(name, **arguments):
    return AIMessage(content="", tool_calls=[{"name": name, "args": arguments, "id": f"call-{name}-{id(arguments)}"}])


REPLIES = [
    call("write_file", file_path="/home/user/data.csv", content="name,score\nada,9\ngrace,7\n"),
    call("write_file", file_path="/home/user/sum.py", content=PROGRAM),
    call("execute", command="python3 sum.py"),
    call("edit_file", file_path="/home/user/data.csv", old_string="grace,7", new_string="grace,33"),
    call("execute", command="python3 sum.py && cat missing"),
    call("grep", pattern="grace", path="/home/user"),
    call("glob", pattern="*.csv", path="/home/user"),
    call("ls", path="/home/user"),
    call("read_file", file_path="/home/user/data.csv"),
    AIMessage(content="The sum was 16, now it is 42."),
]


class Canned(GenericFakeChatModel):
    """Replies in their order, whatever is asked."""

    def bind_tools(self, tools, **kwargs):
        return self


with Sandbox.create("base", timeout=120, metadata={"example": "langchain"}) as sandbox:
    agent = create_deep_agent(model=Canned(messages=iter(REPLIES)), backend=E2BSandbox(sandbox=sandbox))
    state = agent.invoke({"messages": [{"role": "user", "content": "What is the sum of the scores?"}]})
    results = [message.content for message in state["messages"] if isinstance(message, ToolMessage)]
    for result in results:
        print(repr(result))
    wrote, _, first, _, second, found, globbed, listed, read = results
    assert "/home/user/data.csv" in wrote
    assert first.startswith("16\n"), first
    assert second.startswith("42\n") and "No such file" in second, second
    assert "data.csv" in found and "data.csv" in globbed and "sum.py" in listed
    assert "grace,33" in read
    assert sandbox.files.read("/home/user/data.csv").endswith("grace,33\n")
    assert state["messages"][-1].content == "The sum was 16, now it is 42."
