// Does OpenRouter's own SDK work unchanged? It checks every answer strictly against OpenRouter's OpenAPI file: what it does not throw on,
// has OpenRouter's shape.

import assert from "node:assert/strict";
import test from "node:test";

import { OpenRouter } from "@openrouter/sdk";
import { HTTPClient } from "@openrouter/sdk/lib/http";
import * as errors from "@openrouter/sdk/models/errors";

import {
  ABORTABLE, assertBooked, assertCutShort, COST, FORECAST, FORECAST_SAMPLE, IMAGE, MODEL, needs, newAccount, PROMPT, QUESTION, rejection,
  SAID, take, UNKNOWN_MODEL, URL, WEATHER, WRONG_KEY,
} from "./account.mjs";

const sdk = (key, options = {}) =>
  new OpenRouter({ apiKey: key, serverURL: `${URL}/api/v1`, retryConfig: { strategy: "none" }, ...options });
const say = (client, body = {}, options = {}) =>
  client.chat.send({ chatRequest: { model: MODEL, messages: [{ role: "user", content: PROMPT }], ...body } }, options);
const booked = ({ promptTokens: prompt, completionTokens: completion, cost }) => ({ prompt, completion, cost });
const TOOL = { type: "function", function: { name: "get_weather", description: "The weather of a city.", parameters: WEATHER } };

test("a completion says what it cost, and the books agree", async () => {
  const account = await newAccount();
  const answer = await say(sdk(account.key));
  assert.equal(answer.choices[0].message.content, SAID);
  assert.equal(answer.choices[0].finishReason, "stop");
  assert.equal(answer.usage.cost, COST);
  const record = await account.settledRecord();
  assertBooked(record, booked(answer.usage));
  assert.equal(record.generation_id, answer.id);
});

test("a stream ends with its usage", async () => {
  const account = await newAccount();
  let text = "";
  const told = [];
  for await (const event of await say(sdk(account.key), { stream: true })) {
    text += event.choices[0]?.delta.content ?? "";
    if (event.usage) told.push(event.usage);
  }
  assert.equal(text, SAID);
  assert.equal(told.length, 1);
  assert.equal(told[0].cost, COST);
  assertBooked(await account.settledRecord(), booked(told[0]));
});

test("a tool is called and its result is answered", async () => {
  const account = await newAccount();
  const client = sdk(account.key);
  const asked = { role: "user", content: QUESTION };
  const first = await say(client, { messages: [asked], tools: [TOOL] });
  const message = first.choices[0].message;
  const [call] = message.toolCalls;
  assert.equal(call.function.name, "get_weather");
  assert.deepEqual(JSON.parse(call.function.arguments), { city: QUESTION });
  const result = { role: "tool", toolCallId: call.id, content: "18 degrees" };
  const second = await say(client, { messages: [asked, message, result], tools: [TOOL] });
  assert.ok(second.choices[0].message.content.startsWith("The sandbox read “18 degrees”."));
  assertBooked(await account.settledRecord(2), booked(second.usage));
});

test("a streamed tool call arrives in fragments that fit", async () => {
  const account = await newAccount();
  let written = "";
  for await (const event of await say(sdk(account.key), { messages: [{ role: "user", content: QUESTION }], tools: [TOOL], stream: true })) {
    for (const call of event.choices[0]?.delta.toolCalls ?? []) written += call.function?.arguments ?? "";
  }
  assert.deepEqual(JSON.parse(written), { city: QUESTION });
  assert.equal((await account.settledRecord()).finish_reason, "tool_calls");
});

test("structured output conforms to its schema", async () => {
  const account = await newAccount();
  const responseFormat = { type: "json_schema", jsonSchema: { name: "forecast", strict: true, schema: FORECAST } };
  const answer = await say(sdk(account.key), { messages: [{ role: "user", content: QUESTION }], responseFormat });
  assert.deepEqual(JSON.parse(answer.choices[0].message.content), FORECAST_SAMPLE);
  assertBooked(await account.settledRecord(), booked(answer.usage));
});

test("an image is read", async () => {
  const account = await newAccount();
  const content = [{ type: "text", text: "What is this?" }, { type: "image_url", imageUrl: { url: IMAGE } }];
  const answer = await say(sdk(account.key), { messages: [{ role: "user", content }] });
  assert.ok(answer.choices[0].message.content.startsWith("The sandbox read “What is this? [image_url]”."));
  assertBooked(await account.settledRecord(), booked(answer.usage));
});

test("reasoning arrives beside the text, plain and streamed", async () => {
  const account = await newAccount();
  const body = { model: "anthropic/claude-haiku-4.5", reasoning: { effort: "low" } };
  const plain = await say(sdk(account.key), body);
  assert.ok(plain.choices[0].message.reasoning.length > 0);
  let reasoning = "";
  let text = "";
  for await (const event of await say(sdk(account.key), { ...body, stream: true })) {
    reasoning += event.choices[0]?.delta.reasoning ?? "";
    text += event.choices[0]?.delta.content ?? "";
  }
  assert.equal(reasoning, plain.choices[0].message.reasoning);
  assert.equal(text, SAID);
  assert.equal((await account.settledRecord(2)).reasoning_tokens, plain.usage.completionTokensDetails.reasoningTokens);
});

for (const scenario of [
  "usage-empty-choices", "usage-null-finish", "usage-every-event", "usage-twice", "keepalive", "crlf", "split-chunks", "byok", "cache-read",
  "cache-write", "fallback",
]) {
  test(`what upstreams do passes its schemas: ${scenario}`, async () => {
    const account = await newAccount();
    const model = `${MODEL}:${scenario}`;
    assert.equal((await say(sdk(account.key), { model })).choices[0].message.content, SAID);
    let text = "";
    for await (const event of await say(sdk(account.key), { model, stream: true })) text += event.choices[0]?.delta.content ?? "";
    assert.equal(text, SAID);
    await account.settledRecord(2);
  });
}

const refusals = [
  ["a wrong key", async () => WRONG_KEY, MODEL, 401, errors.UnauthorizedResponseError],
  ["no credits", async () => (await newAccount(0)).key, MODEL, 402, errors.PaymentRequiredResponseError],
  ["an unknown model", async () => (await newAccount()).key, UNKNOWN_MODEL, 404, errors.NotFoundResponseError],
];

for (const [name, makeKey, model, status, kind] of refusals) {
  test(`${name} is an error with status ${status}`, async () => {
    const error = await rejection(say(sdk(await makeKey()), { model }));
    assert.ok(error instanceof errors.OpenRouterError, String(error));
    assert.equal(error.statusCode, status);
  });

  test(`${name} is the SDK's own class of error`, needs("numeric error codes under /api/v1"), async () => {
    for (const stream of [false, true]) {
      const error = await rejection(say(sdk(await makeKey()), { model, stream }));
      assert.ok(error instanceof kind, String(error));
      assert.equal(error.error.code, status);
      assert.ok(error.message.length > 10);
    }
  });
}

test("over the rate limit it is an error that says when", async () => {
  const account = await newAccount();
  await account.limit({ burst: 1 });
  await say(sdk(account.key));
  const error = await rejection(say(sdk(account.key)));
  assert.equal(error.statusCode, 429);
  assert.ok([1, 2].includes(Number(error.headers.get("retry-after"))));
});

test("over the rate limit it is the SDK's own class of error", needs("numeric error codes under /api/v1"), async () => {
  const account = await newAccount();
  await account.limit({ burst: 1 });
  await say(sdk(account.key));
  assert.ok((await rejection(say(sdk(account.key)))) instanceof errors.TooManyRequestsResponseError);
});

test("one retry is enough because Retry-After is honoured", async () => {
  const account = await newAccount();
  await account.limit({ burst: 1 });
  let calls = 0;
  const httpClient = new HTTPClient();
  httpClient.addHook("beforeRequest", () => void calls++);
  // By itself it would pause for less than a second, and then again.
  const backoff = { initialInterval: 1, maxInterval: 10_000, exponent: 1, maxElapsedTime: 10_000 };
  const client = sdk(account.key, { httpClient, retryConfig: { strategy: "backoff", backoff } });
  await say(client);
  assert.equal((await say(client, {}, { retryCodes: ["429"] })).choices[0].message.content, SAID);
  assert.equal(calls, 3);
  await account.settledRecord(2);
});

test("an error in mid-stream is an event with an error", async () => {
  const account = await newAccount();
  const found = [];
  for await (const { error } of await say(sdk(account.key), { model: `${MODEL}:stream-error;count=3`, stream: true })) {
    if (error) found.push([error.code, error.metadata.errorType]);
  }
  assert.deepEqual(found, [[429, "rate_limit_exceeded"]]);
  assert.equal((await account.settledRecord()).status, "failed");
});

for (const [scenario, code, kind] of [
  ["stream-error-string", 502, "server_error"],
  ["cut", 502, "upstream_error"],
]) {
  test(`what goes wrong in mid-stream passes its schemas: ${scenario}`, async () => {
    const account = await newAccount();
    const found = [];
    for await (const { error } of await say(sdk(account.key), { model: `${MODEL}:${scenario};count=3`, stream: true })) {
      if (error) found.push([error.code, error.metadata.errorType]);
    }
    assert.deepEqual(found, [[code, kind]]);
    assert.equal((await account.settledRecord()).status, "failed");
  });
}

test("who leaves in mid-stream has one settled record", async () => {
  const account = await newAccount();
  const leaving = new AbortController();
  const stream = await say(sdk(account.key), { model: ABORTABLE, stream: true }, { fetchOptions: { signal: leaving.signal } });
  assert.equal((await take(stream, 3)).length, 3);
  leaving.abort();
  assertCutShort(await account.settledRecord());
});

test("the models pass its schema, each of them", async () => {
  const account = await newAccount();
  const ids = [];
  for await (const { result } of await sdk(account.key).models.list()) ids.push(...result.data.map((model) => model.id));
  assert.ok(ids.includes(MODEL));
  assert.equal(new Set(ids).size, ids.length);
});

test("the models come page by page", needs("pages of /api/v1/models"), async () => {
  const account = await newAccount();
  const { data: all } = await (await fetch(`${URL}/api/v1/models`)).json();
  const ids = [];
  for await (const { result } of await sdk(account.key).models.list({ limit: 5 })) {
    assert.ok(result.data.length <= 5);
    ids.push(...result.data.map((model) => model.id));
  }
  assert.deepEqual(ids, all.map((model) => model.id));
});

test("one model is read by its author and slug", needs("GET /api/v1/model/openai/gpt-4o-mini"), async () => {
  const account = await newAccount();
  const { data: model } = await sdk(account.key).models.get({ author: "openai", slug: "gpt-4o-mini" });
  assert.equal(model.id, MODEL);
  assert.equal(model.pricing.prompt, "0.00000015");
});

test("the models are counted", needs("GET /api/v1/models/count"), async () => {
  const account = await newAccount();
  const { data: all } = await (await fetch(`${URL}/api/v1/models`)).json();
  assert.equal((await sdk(account.key).models.count()).data.count, all.length);
});

test("the providers of a model pass its schema", needs("GET /api/v1/models/openai/gpt-4o-mini/endpoints"), async () => {
  const account = await newAccount();
  const { data: found } = await sdk(account.key).endpoints.list({ author: "openai", slug: "gpt-4o-mini" });
  assert.equal(found.id, MODEL);
  assert.deepEqual(found.endpoints.map((endpoint) => endpoint.pricing.prompt), ["0.00000015", "0.00000015"]);
});
