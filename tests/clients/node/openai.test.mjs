// Does OpenAI's SDK for Node work unchanged? Chat completions in every way that it offers, its error classes, and its retries.

import assert from "node:assert/strict";
import test from "node:test";

import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

import {
  ABORTABLE, assertBooked, assertCutShort, COST, FORECAST, FORECAST_SAMPLE, IMAGE, MODEL, newAccount, PROMPT, QUESTION,
  rejection, SAID, take, UNKNOWN_MODEL, URL, WEATHER, WRONG_KEY,
} from "./account.mjs";

const sdk = (key, options = {}) => new OpenAI({ baseURL: `${URL}/v1`, apiKey: key, maxRetries: 0, ...options });
const say = (client, body = {}) => client.chat.completions.create({ model: MODEL, messages: [{ role: "user", content: PROMPT }], ...body });
const TOOL = { type: "function", function: { name: "get_weather", description: "The weather of a city.", parameters: WEATHER } };

test("a completion says what it cost, and the books agree", async () => {
  const account = await newAccount();
  const answer = await say(sdk(account.key));
  assert.equal(answer.choices[0].message.content, SAID);
  assert.equal(answer.choices[0].finish_reason, "stop");
  assert.equal(answer.usage.cost, COST);
  const record = await account.settledRecord();
  assertBooked(record, { prompt: answer.usage.prompt_tokens, completion: answer.usage.completion_tokens, cost: COST });
  assert.equal(answer.gateway_usage.cost, COST);
  assert.equal(answer._request_id, record.request_id);
});

test("a stream ends with its usage", async () => {
  const account = await newAccount();
  let text = "";
  const told = [];
  for await (const event of await say(sdk(account.key), { stream: true, stream_options: { include_usage: true } })) {
    text += event.choices[0]?.delta.content ?? "";
    if (event.usage) told.push(event);
  }
  assert.equal(text, SAID);
  assert.equal(told.length, 1);
  const { usage, gateway_usage: charged } = told[0];
  assertBooked(await account.settledRecord(), { prompt: usage.prompt_tokens, completion: usage.completion_tokens, cost: COST });
  assert.equal(charged.cost, COST);
});

test("the stream helper gathers the whole answer", async () => {
  const account = await newAccount();
  const stream = sdk(account.key).chat.completions.stream({ model: MODEL, messages: [{ role: "user", content: PROMPT }] });
  assert.equal(await stream.finalContent(), SAID);
  assert.equal((await account.settledRecord()).cost, COST);
});

test("a tool is called and its result is answered", async () => {
  const account = await newAccount();
  const client = sdk(account.key);
  const asked = { role: "user", content: QUESTION };
  const first = await say(client, { messages: [asked], tools: [TOOL] });
  const [call] = first.choices[0].message.tool_calls;
  assert.equal(call.function.name, "get_weather");
  assert.deepEqual(JSON.parse(call.function.arguments), { city: QUESTION });
  const result = { role: "tool", tool_call_id: call.id, content: "18 degrees" };
  const second = await say(client, { messages: [asked, first.choices[0].message, result], tools: [TOOL] });
  assert.ok(second.choices[0].message.content.startsWith("The sandbox read “18 degrees”."));
  const { prompt_tokens: prompt, completion_tokens: completion, cost } = second.usage;
  assertBooked(await account.settledRecord(2), { prompt, completion, cost });
});

test("the tool runner goes through the whole round trip by itself", async () => {
  const account = await newAccount();
  const cities = [];
  const tool = { ...TOOL.function, parse: JSON.parse, function: ({ city }) => (cities.push(city), "18 degrees") };
  const runner = sdk(account.key).chat.completions.runTools({
    model: MODEL, messages: [{ role: "user", content: QUESTION }], tools: [{ type: "function", function: tool }], stream: true,
  });
  assert.ok((await runner.finalContent()).startsWith("The sandbox read “18 degrees”."));
  assert.deepEqual(cities, [QUESTION]);
  await account.settledRecord(2);
});

test("structured output conforms to its schema", async () => {
  const account = await newAccount();
  const form = { type: "json_schema", json_schema: { name: "forecast", strict: true, schema: FORECAST } };
  const answer = await say(sdk(account.key), { messages: [{ role: "user", content: QUESTION }], response_format: form });
  assert.deepEqual(JSON.parse(answer.choices[0].message.content), FORECAST_SAMPLE);
});

test("structured output is parsed with zod", async () => {
  const account = await newAccount();
  const answer = await sdk(account.key).chat.completions.parse({
    model: MODEL, messages: [{ role: "user", content: QUESTION }],
    response_format: zodResponseFormat(z.object({ city: z.string(), degrees: z.int() }), "forecast"),
  });
  assert.equal(answer.choices[0].message.parsed.city, QUESTION);
});

test("an image is read", async () => {
  const account = await newAccount();
  const content = [{ type: "text", text: "What is this?" }, { type: "image_url", image_url: { url: IMAGE } }];
  const answer = await say(sdk(account.key), { messages: [{ role: "user", content }] });
  assert.ok(answer.choices[0].message.content.startsWith("The sandbox read “What is this? [image_url]”."));
  const { prompt_tokens: prompt, completion_tokens: completion, cost } = answer.usage;
  assertBooked(await account.settledRecord(), { prompt, completion, cost });
});

test("a wrong key is an authentication error", async () => {
  const error = await rejection(say(sdk(WRONG_KEY)));
  assert.ok(error instanceof OpenAI.AuthenticationError);
  assert.deepEqual([error.status, error.code, error.type], [401, "invalid_api_key", "authentication_error"]);
  assert.ok(error.requestID);
});

test("an unknown model is a not-found error", async () => {
  const account = await newAccount();
  const error = await rejection(say(sdk(account.key), { model: UNKNOWN_MODEL }));
  assert.ok(error instanceof OpenAI.NotFoundError);
  assert.deepEqual([error.code, error.param], ["model_not_found", "model"]);
  assert.deepEqual(await account.records(), []);
});

test("without credits it is a 402 that is not repeated", async () => {
  const account = await newAccount(0);
  let calls = 0;
  const counting = (...request) => (calls++, fetch(...request));
  const error = await rejection(say(sdk(account.key, { maxRetries: 2, fetch: counting })));
  assert.ok(error instanceof OpenAI.APIError);
  assert.deepEqual([error.status, error.code, calls], [402, "insufficient_credits", 1]);
});

test("over the rate limit it is a rate-limit error that says when", async () => {
  const account = await newAccount();
  await account.limit({ burst: 1 });
  await say(sdk(account.key));
  const error = await rejection(say(sdk(account.key)));
  assert.ok(error instanceof OpenAI.RateLimitError);
  assert.ok([1, 2].includes(Number(error.headers.get("retry-after"))));
});

test("one retry is enough because Retry-After is honoured", async () => {
  const account = await newAccount();
  await account.limit({ burst: 1 });
  const client = sdk(account.key, { maxRetries: 1 });
  await say(client);
  assert.equal((await say(client)).choices[0].message.content, SAID);
  await account.settledRecord(2);
});

test("who leaves in mid-stream has one settled record", async () => {
  const account = await newAccount();
  const stream = await say(sdk(account.key), { model: ABORTABLE, stream: true });
  assert.equal((await take(stream, 3)).length, 3);
  stream.controller.abort();
  assertCutShort(await account.settledRecord());
});

test("the models are listed and read one by one", async () => {
  const account = await newAccount();
  const client = sdk(account.key);
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  assert.ok(ids.includes(MODEL));
  assert.equal((await client.models.retrieve(MODEL)).id, MODEL);
  assert.ok((await rejection(client.models.retrieve(UNKNOWN_MODEL))) instanceof OpenAI.NotFoundError);
});
