"""Greetings, thanks, questions about the model itself, and honest ignorance."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from phrasing import Conversation, Phrasings, ask, casual

from topics.words import FOODS, JOBS, PLACES, a_city, a_name


class Turn(NamedTuple):
    """Things people say with one meaning, fitting answers, and the words none of them lacks."""

    says: tuple[str, ...]
    answers: tuple[str, ...]
    keywords: tuple[str, ...] = ()


TURNS = (
    Turn(
        ("Hello!", "Hi!", "Hi there!", "Hey!", "Good morning!", "Good evening!", "Hello there.", "Hi", "Hello, how are you?",
         "Good day!", "Greetings!", "Hey there!", "Hello again!", "Good afternoon!", "Hi, nice to meet you.", "hello hello", "Howdy!"),
        ("Hello! How can I help you?", "Hi! What can I do for you?", "Hello! Ask me about vllm-lite, or give me a small task."),
        ("!",)),
    Turn(
        ("How are you?", "How are you today?", "How do you do?", "How is it going?", "Are you well?", "How do you feel?", "What's up?",
         "How have you been?", "Is everything fine?"),
        ("I am fine, thank you! How can I help you?", "I am well, thank you. What can I do for you?"),
        ("thank you",)),
    Turn(
        ("Thank you!", "Thanks!", "Thanks a lot.", "Thank you very much.", "That helped, thanks.", "Great, thank you.", "Thx", "Perfect, thanks!",
         "Thank you for your help.", "Many thanks!", "That was useful."),
        ("You are welcome!", "You are welcome! Ask me anything else.", "Glad to help!")),
    Turn(
        ("Goodbye!", "Bye!", "See you later.", "Good night!", "I have to go now.", "Bye bye", "See you!", "That is all, bye.", "Until tomorrow!",
         "Farewell!"),
        ("Goodbye! Have a nice day.", "Bye! See you soon.")),
    Turn(
        ("Who are you?", "What are you?", "What is your name?", "Introduce yourself.", "Tell me about yourself.", "Which model are you?", "Who am I talking to?",
         "What model is this?", "Are you a language model?", "What should I call you?", "Are you an AI?", "Say something about yourself.", "Which model is running?",
         "What's your name?", "Who is this?", "Are you ChatGPT?", "Are you human?"),
        ("I am vllm-lite-demo, a small demonstration model. Serve a real model with `--model`.",
         "I am vllm-lite-demo, a small model that shows how vllm-lite works. For real tasks use `--model` with a larger one.",
         "My name is vllm-lite-demo. I am a small demonstration model embedded in vllm-lite."),
        ("vllm-lite-demo",)),
    Turn(
        ("What can you do?", "How can you help me?", "What are you able to do?", "What do you know?", "Can you help me?", "What are your skills?",
         "What tasks can you do?", "I need help.", "What should I ask you?", "Help!", "Give me some ideas what to ask."),
        ("I can answer questions about vllm-lite, do small sums, count, copy, write JSON, call tools and tell short stories.",
         "Ask me about vllm-lite, a small sum, a list, a JSON answer or a short story. I am only a small demonstration model."),
        ("vllm-lite",)),
    Turn(
        ("Who made you?", "Who created you?", "Where do you come from?", "How were you trained?", "Who trained you?", "What were you trained on?",
         "On what data were you trained?"),
        ("I was trained by a script of vllm-lite on text that a generator wrote.",
         "A script in the vllm-lite repository trained me on generated text."),
        ("script",)),
    Turn(
        ("How large are you?", "How many parameters do you have?", "How big is this model?", "What is your size?", "Are you a large model?"),
        ("I have about five million parameters, so I am very small.", "I am very small: about five million parameters."),
        ("five million",)),
    Turn(
        ("Say hello.", "Say hello to everyone.", "Greet me.", "Please say hi.", "Say hello to the audience."),
        ("Hello!", "Hello everyone!"),
        ("Hello",)),
    Turn(
        ("You are wrong.", "That is not right.", "This is false.", "You made a mistake.", "I do not believe you.", "No, that is wrong."),
        ("I am sorry. I am a small demonstration model and make mistakes.", "Sorry about that! I am only a small demonstration model."),
        ("demonstration model",)),
    Turn(
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Say something funny.", "A joke, please."),
        ("Why did the token wait? Because the batch was full.", "What does a cache say to an old friend? Nice to hit you again!")),
)  # fmt: skip

UNKNOWN = (
    "Who won the football game in {city}?", "What is the history of {city}?", "Who is the president?", "What is the meaning of life?",
    "Explain quantum physics.", "Write a poem about {food}.", "What happened in the news today?", "Translate this into French: {food}",
    "How do I cook {food}?", "Who wrote Hamlet?", "What is the capital of the moon?", "How does a car engine work?",
    "Can you recommend a book about {job}s?", "What is the population of {city}?", "Tell me about {name}.", "How old is the {place}?",
    "What stocks should I buy?", "Solve this integral.", "How do vaccines work?", "Who is {name}?", "What is Rust?", "Explain the theory of relativity.",
    "What is the best restaurant in {city}?", "Which film should I watch?", "How tall is Mount Everest?", "What is photosynthesis?",
    "Write an essay about {place}s.", "Who invented the telephone?", "How far is {city} from here?", "What time is it?",
    "Who won the world cup?", "Is it raining?", "What is love?", "What is the weather in {city}?", "What is the weather like today?", "Who is the king of {city}?",
    "Write a Python function.", "Write code that sorts a list.", "What is Python?", "What is Linux?", "How do planes fly?", "Why is the sky blue?",
    "What is the speed of light?", "Who painted the Mona Lisa?", "When was {city} founded?", "What should I cook today?", "How many people live in {city}?",
    "What is a black hole?", "What is the largest animal?", "Summarize this book.", "Translate hello into Spanish.", "What is machine learning?",
    "Who discovered America?", "How do I become a {job}?", "Where can I buy {food}?", "What does a {job} do?", "What is DNA?", "Plan a trip to {city}.",
)  # fmt: skip
UNKNOWN_ANSWERS = (
    "I am a small demonstration model and do not know that. Serve a larger model with `--model`.",
    "Sorry, I do not know that. I am only a small demonstration model; use `--model` for a larger one.",
)
CAPITALS = (
    "What is the capital of {country}?",
    "Which city is the capital of {country}?",
    "Name the capital of {country}.",
    "Capital of {country}?",
)
SYSTEMS = (
    "",
    "",
    "",
    "",
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "Be polite.",
)


def generate(rng: Random, phrasings: Phrasings) -> Conversation:
    """Something people say to a chat model, and a fitting answer."""
    system = rng.choice(SYSTEMS)
    if rng.random() < 0.22:
        question = phrasings.pick(UNKNOWN).format(
            city=a_city(rng), food=rng.choice(FOODS), job=rng.choice(JOBS), name=a_name(rng), place=rng.choice(PLACES)
        )  # fmt: skip
        answer = rng.choice(UNKNOWN_ANSWERS)
        return Conversation(
            "smalltalk", ask(casual(rng, question), answer, system), keywords=("--model",)
        )
    turn = rng.choice(TURNS)
    question = casual(rng, phrasings.pick(turn.says))
    answer = rng.choice(turn.answers)
    accepted = () if turn.keywords else turn.answers
    messages = ask(question, answer, system)
    return Conversation("smalltalk", messages, keywords=turn.keywords, accepted=accepted)
