"""Complete a prompt through an OpenAI-compatible server: `python complete.py MODEL PROMPT [--url http://localhost:8000/v1]`."""

import argparse

from openai import OpenAI


def complete(url: str, model: str, prompt: str, max_tokens: int = 32) -> str:
    """The greedy continuation that the server at `url` gives."""
    client = OpenAI(base_url=url, api_key="none", max_retries=0)
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=max_tokens, temperature=0)
    return answer.choices[0].text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("prompt")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--max-tokens", type=int, default=32)
    given = parser.parse_args()
    print(complete(given.url, given.model, given.prompt, given.max_tokens))
