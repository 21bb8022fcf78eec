// Does the Vercel AI SDK with the OpenRouter provider work unchanged? The provider checks every answer against its own schemas.

import assert from "node:assert/strict";
import test from "node:test";

import { createOpenRouter } from "@openrouter/ai-sdk-provider";
import { APICallError, embedMany, generateText, jsonSchema, Output, RetryError, stepCountIs, streamText, tool } from "ai";

import {
  ABORTABLE, assertBooked, assertCutShort, COST, EMBEDDER, FORECAST, FORECAST_SAMPLE, IMAGE, MODEL, needs, newAccount,
  PROMPT, QUESTION, rejection, SAID, UNKNOWN_MODEL, URL, WEATHER, WRONG_KEY,
} from "./account.mjs";

const provider = (key) => createOpenRouter({ apiKey: key, baseURL: `${URL}/api/v1`, compatibility: "strict" });
const chat = (key, model = MODEL) => provider(key).chat(model);
const say = (key, options = {}) => generateText({ model: chat(key), prompt: PROMPT, maxRetries: 0, ...options });
const silent = { onError: () => {} }; // it would print the errors that are asserted here

const weatherTool = (cities) =>
  tool({
    description: "The weather of a city.",
    inputSchema: jsonSchema(WEATHER),
    execute: async ({ city }) => (cities.push(city), "18 degrees"),
  });

test("a completion says what it cost, and the books agree", async () => {
  const account = await newAccount();
  const answer = await say(account.key);
  assert.equal(answer.text, SAID);
  assert.equal(answer.finishReason, "stop");
  const told = answer.providerMetadata.openrouter;
  assert.equal(told.provider, "OpenAI");
  assert.equal(told.usage.cost, COST);
  const record = await account.settledRecord();
  assertBooked(record, { prompt: answer.usage.inputTokens, completion: answer.usage.outputTokens, cost: COST });
  assert.equal(record.generation_id, answer.response.id);
});

test("a stream ends with its usage", async () => {
  const account = await newAccount();
  const answer = streamText({ model: chat(account.key), prompt: PROMPT, maxRetries: 0 });
  let text = "";
  for await (const piece of answer.textStream) text += piece;
  assert.equal(text, SAID);
  const usage = await answer.usage;
  assertBooked(await account.settledRecord(), { prompt: usage.inputTokens, completion: usage.outputTokens, cost: COST });
  assert.equal((await answer.providerMetadata).openrouter.usage.cost, COST);
});

test("a tool goes through the whole round trip, plain and streamed", async () => {
  const account = await newAccount();
  const cities = [];
  const options = { model: chat(account.key), prompt: QUESTION, tools: { get_weather: weatherTool(cities) }, stopWhen: stepCountIs(3) };
  const plain = await generateText(options);
  assert.ok(plain.text.startsWith("The sandbox read “18 degrees”."), plain.text);
  assert.equal(plain.steps.length, 2);
  const streamed = streamText(options);
  await streamed.consumeStream();
  assert.equal(await streamed.text, plain.text);
  assert.deepEqual(cities, [QUESTION, QUESTION]);
  const record = await account.settledRecord(4);
  const last = (await streamed.steps).at(-1).usage;
  assertBooked(record, { prompt: last.inputTokens, completion: last.outputTokens });
});

test("structured output conforms to its schema", async () => {
  const account = await newAccount();
  const answer = await say(account.key, { prompt: QUESTION, output: Output.object({ schema: jsonSchema(FORECAST) }) });
  assert.deepEqual(answer.output, FORECAST_SAMPLE);
  assert.equal((await account.settledRecord()).status, "completed");
});

test("an image is read", async () => {
  const account = await newAccount();
  const content = [{ type: "text", text: "What is this?" }, { type: "image", image: IMAGE }];
  const answer = await say(account.key, { prompt: [{ role: "user", content }] });
  assert.ok(answer.text.startsWith("The sandbox read “What is this? [image_url]”."), answer.text);
  assertBooked(await account.settledRecord(), { prompt: answer.usage.inputTokens, completion: answer.usage.outputTokens });
});

test("reasoning arrives beside the text, plain and streamed", async () => {
  const account = await newAccount();
  const model = chat(account.key, "anthropic/claude-haiku-4.5");
  const providerOptions = { openrouter: { reasoning: { effort: "low" } } };
  const plain = await generateText({ model, prompt: PROMPT, providerOptions });
  const streamed = streamText({ model, prompt: PROMPT, providerOptions });
  assert.equal(await streamed.reasoningText, plain.reasoningText);
  assert.ok(plain.reasoningText.length > 0);
  assert.equal(await streamed.text, SAID);
  const record = await account.settledRecord(2);
  assert.equal(record.reasoning_tokens, plain.usage.outputTokenDetails.reasoningTokens);
});

for (const [name, key, model, status] of [
  ["a wrong key", () => WRONG_KEY, MODEL, 401],
  ["an unknown model", async () => (await newAccount()).key, UNKNOWN_MODEL, 404],
  ["no credits", async () => (await newAccount(0)).key, MODEL, 402],
]) {
  test(`${name} is an API call error with status ${status} that is not repeated`, async () => {
    const error = await rejection(say("", { model: chat(await key(), model), maxRetries: 2 }));
    assert.ok(APICallError.isInstance(error), String(error));
    assert.deepEqual([error.statusCode, error.isRetryable], [status, false]);
    assert.ok(error.data.error.message.length > 10);
  });

  test(`${name} reaches the reader of a stream`, async () => {
    const found = [];
    const onError = ({ error }) => void found.push(error);
    const answer = streamText({ model: chat(await key(), model), prompt: PROMPT, maxRetries: 0, onError });
    await answer.consumeStream(silent);
    assert.deepEqual(found.map((error) => error.statusCode), [status]);
  });
}

test("over the rate limit it is a retryable error that says when", async () => {
  const account = await newAccount();
  await account.limit({ burst: 1 });
  await say(account.key);
  const error = await rejection(say(account.key));
  assert.ok(APICallError.isInstance(error) || RetryError.isInstance(error));
  assert.deepEqual([error.statusCode, error.isRetryable], [429, true]);
  assert.ok([1, 2].includes(Number(error.responseHeaders["retry-after"])));
});

test("after the pause of one retry the limit has passed", async () => {
  const account = await newAccount();
  await account.limit({ burst: 1 });
  await say(account.key);
  assert.equal((await say(account.key, { maxRetries: 1 })).text, SAID);
  await account.settledRecord(2);
});

test("an error in mid-stream reaches the reader", async () => {
  const account = await newAccount();
  const found = [];
  const answer = streamText({
    model: chat(account.key, `${MODEL}:stream-error;count=3`), prompt: PROMPT, onError: ({ error }) => found.push(error),
  });
  await answer.consumeStream(silent);
  assert.equal(found.length, 1);
  assert.equal((await account.settledRecord()).status, "failed");
});

test("who leaves in mid-stream has one settled record", async () => {
  const account = await newAccount();
  const leaving = new AbortController();
  const answer = streamText({ model: chat(account.key, ABORTABLE), prompt: PROMPT, abortSignal: leaving.signal, ...silent });
  let pieces = 0;
  for await (const piece of answer.textStream) {
    assert.ok(piece);
    if (++pieces === 3) leaving.abort();
  }
  assertCutShort(await account.settledRecord());
});

test("texts become vectors", needs("POST /api/v1/embeddings"), async () => {
  const account = await newAccount();
  const answer = await embedMany({ model: provider(account.key).textEmbeddingModel(EMBEDDER), values: ["one", "two"] });
  assert.deepEqual(answer.embeddings.map((vector) => vector.length), [1536, 1536]);
  const record = await account.settledRecord();
  assert.deepEqual([record.endpoint, record.prompt_tokens], ["embeddings", answer.usage.tokens]);
});

test("a text completion is billed as told", needs("POST /api/v1/completions"), async () => {
  const account = await newAccount();
  const answer = await say(account.key, { model: provider(account.key).completion(MODEL) });
  assert.ok(answer.text.startsWith("The sandbox read “"), answer.text);
  assertBooked(await account.settledRecord(), { prompt: answer.usage.inputTokens, completion: answer.usage.outputTokens });
});
