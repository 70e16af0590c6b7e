"""A smolagents agent whose Python runs in a sandbox: pip install 'smolagents[e2b]'; E2B_API_URL, E2B_SANDBOX_URL and
E2B_API_KEY are set, and the server has the template of the code interpreter.

No model: `Canned` gives the replies that a model would, through the interface that smolagents has for models.
"""

from smolagents import ChatMessage, CodeAgent, MessageRole, Model, tool

REPLIES = [
    # State is kept from one step to the next, in the sandbox.
    "Thought: count the words first.\n<code>\nwords = text.split()\nprint('words:', word_count(text))\n</code>",
    # An error goes back to the model as an observation, and the agent goes on.
    "Thought: the longest one.\n<code>\nprint(longest)\n</code>",
    "Thought: it has to be made.\n<code>\nlongest = max(words, key=len)\nimport os\nhost = os.environ['E2B_SANDBOX_ID']\nprint(longest)\n</code>",
    "Thought: done.\n<code>\nfinal_answer({'words': len(words), 'longest': longest, 'sandbox': host})\n</code>",
]


class Canned(Model):
    """Replies in their order, whatever is asked."""

    def __init__(self, replies):
        super().__init__(model_id="canned")
        self.replies = iter(replies)
        self.asked = []

    def generate(self, messages, stop_sequences=None, response_format=None, tools_to_call_from=None, **kwargs):
        self.asked.append("\n".join(str(part) for message in messages for part in message.content or []))
        return ChatMessage(role=MessageRole.ASSISTANT, content=next(self.replies))


@tool
def word_count(text: str) -> int:
    """Counts words; smolagents sends the source of a tool into the sandbox.

    Args:
        text: What to count in.
    """
    return len(text.split())


model = Canned(REPLIES)
with CodeAgent(
    tools=[word_count],
    model=model,
    executor_type="e2b",
    executor_kwargs={"timeout": 120, "metadata": {"example": "smolagents"}},
) as agent:
    sandbox = agent.python_executor.sandbox
    answer = agent.run("How many words, and which is the longest?", additional_args={"text": "a machine in milliseconds"})

assert answer == {"words": 4, "longest": "milliseconds", "sandbox": sandbox.sandbox_id}, answer
assert "words: 4" in model.asked[1], "what was printed in the sandbox came back"
assert "NameError" in model.asked[2], "so did the error of the second step"
assert not sandbox.is_running(), "the agent ended its sandbox"
print(answer)
