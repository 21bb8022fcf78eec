// Does the Vercel AI SDK work with its own OpenAI and Anthropic providers, pointed at the gateway? They check every event by schemas of
// their own, and leave out what does not fit: an error in a stream that they cannot read would be an answer that just ends.

import assert from "node:assert/strict";
import test from "node:test";

import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { APICallError, embed, experimental_generateSpeech as generateSpeech, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";

import { ABORTABLE_SOON_OVER, assertBooked, EMBEDDER, MODEL, newAccount, PROMPT, QUESTION, rejection, SAID, URL, WEATHER, WRONG_KEY } from "./account.mjs";

const CLAUDE = "anthropic/claude-haiku-4.5";
const openai = (key) => createOpenAI({ apiKey: key, baseURL: `${URL}/v1` });
const anthropic = (key) => createAnthropic({ apiKey: key, baseURL: `${URL}/v1` });
const silent = { onError: () => {} }; // it would print the errors that are asserted here

const MODELS = [
  ["responses", (key, scenario = "") => openai(key).responses(MODEL + scenario)],
  ["chat", (key, scenario = "") => openai(key).chat(MODEL + scenario)],
  ["messages", (key, scenario = "") => anthropic(key)(CLAUDE + scenario)],
];

for (const [name, model] of MODELS) {
  test(`${name}: plain and streamed say the same, and both are booked as told`, async () => {
    const account = await newAccount();
    const plain = await generateText({ model: model(account.key), prompt: PROMPT, maxRetries: 0 });
    assert.equal(plain.text, SAID);
    const streamed = streamText({ model: model(account.key), prompt: PROMPT, maxRetries: 0 });
    assert.equal(await streamed.text, SAID);
    const usage = await streamed.usage;
    assert.deepEqual([usage.inputTokens, usage.outputTokens], [plain.usage.inputTokens, plain.usage.outputTokens]);
    assertBooked(await account.settledRecord(2), { prompt: usage.inputTokens, completion: usage.outputTokens });
  });

  test(`${name}: a tool goes through the whole round trip`, async () => {
    const account = await newAccount();
    const cities = [];
    const execute = async ({ city }) => (cities.push(city), "18 degrees");
    const tools = { get_weather: tool({ description: "The weather of a city.", inputSchema: jsonSchema(WEATHER), execute }) };
    const answer = streamText({ model: model(account.key), prompt: QUESTION, tools, stopWhen: stepCountIs(3) });
    await answer.consumeStream();
    assert.ok((await answer.text).length > 0);
    assert.deepEqual(cities, [QUESTION]);
    await account.settledRecord(2);
  });

  test(`${name}: an error in mid-stream reaches the reader`, async () => {
    const account = await newAccount();
    const found = [];
    const onError = ({ error }) => void found.push(error);
    const answer = streamText({ model: model(account.key, ":stream-error;count=3"), prompt: PROMPT, maxRetries: 0, onError });
    await answer.consumeStream(silent);
    // In chat the upstream's error comes in a chunk with choices, of which this provider reads the reason alone.
    assert.deepEqual([found.length, await answer.finishReason], name === "chat" ? [0, "other"] : [1, "error"]);
    assert.equal((await account.settledRecord()).status, "failed");
  });

  test(`${name}: that a stream broke off reaches the reader`, async () => {
    const account = await newAccount();
    const found = [];
    const onError = ({ error }) => void found.push(error);
    const answer = streamText({ model: model(account.key, ":cut;count=3"), prompt: PROMPT, maxRetries: 0, onError });
    await answer.consumeStream(silent);
    assert.equal(found.length, 1);
    assert.equal((await account.settledRecord()).status, "failed");
  });

  test(`${name}: a wrong key is an API call error with its sentence`, async () => {
    const error = await rejection(generateText({ model: model(WRONG_KEY), prompt: PROMPT, maxRetries: 0 }));
    assert.ok(APICallError.isInstance(error), String(error));
    assert.equal(error.statusCode, 401);
    assert.ok(error.message.includes("API key"), error.message);
  });
}

test("responses: who leaves in mid-stream pays for the whole answer, which no provider's name said could be cut", async () => {
  const account = await newAccount();
  const leaving = new AbortController();
  const model = openai(account.key).responses(ABORTABLE_SOON_OVER);
  const answer = streamText({ model, prompt: PROMPT, abortSignal: leaving.signal, ...silent });
  let pieces = 0;
  for await (const piece of answer.textStream) {
    assert.ok(piece);
    if (++pieces === 3) leaving.abort();
  }
  const record = await account.settledRecord();
  assert.equal(record.status, "cancelled");
});

test("a text becomes a vector", async () => {
  const account = await newAccount();
  const answer = await embed({ model: openai(account.key).textEmbeddingModel(EMBEDDER), value: "one" });
  assert.equal(answer.embedding.length, 1536);
  assert.equal((await account.settledRecord()).prompt_tokens, answer.usage.tokens);
});

test("a text becomes speech", async () => {
  const account = await newAccount();
  const answer = await generateSpeech({ model: openai(account.key).speech("openai/gpt-4o-mini-tts"), text: PROMPT, voice: "alloy" });
  assert.ok(answer.audio.uint8Array.length > 100);
  assert.equal((await account.settledRecord()).status, "completed");
});
