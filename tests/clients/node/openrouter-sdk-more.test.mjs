// Do the other endpoints of OpenRouter's own SDK work unchanged? Responses, embeddings, rerank, images, audio, and the account's own.

import assert from "node:assert/strict";
import test from "node:test";

import { OpenRouter } from "@openrouter/sdk";
import * as errors from "@openrouter/sdk/models/errors";

import {
  ABORTABLE_SOON_OVER, assertBooked, assertLeft, EMBEDDER, MODEL, modelThatMakes, needs, newAccount, PROMPT, QUESTION, rejection, take,
  UNKNOWN_MODEL, URL, wav, WEATHER, WRONG_KEY,
} from "./account.mjs";

const sdk = (key) => new OpenRouter({ apiKey: key, serverURL: `${URL}/api/v1`, retryConfig: { strategy: "none" } });
const respond = (key, body = {}, options = {}) =>
  sdk(key).responses.send({ responsesRequest: { model: MODEL, input: PROMPT, ...body } }, options);
const READ = "The sandbox read “Say hello.”.";
const textOf = ({ output }) =>
  output.filter((item) => item.type === "message").flatMap((item) => item.content).map((part) => part.text).join("");
const booked = ({ inputTokens: prompt, outputTokens: completion, cost }) => ({ prompt, completion, cost });

const responses = needs("POST /api/v1/responses");

test("a response is billed as told", responses, async () => {
  const account = await newAccount();
  const answer = await respond(account.key);
  assert.ok(textOf(answer).startsWith(READ), textOf(answer));
  assert.equal(answer.status, "completed");
  assertBooked(await account.settledRecord(), booked(answer.usage));
});

test("a streamed response ends with its usage", responses, async () => {
  const account = await newAccount();
  let text = "";
  let last;
  for await (const event of await respond(account.key, { stream: true })) {
    if (event.type === "response.output_text.delta") text += event.delta;
    last = event;
  }
  assert.ok(text.startsWith(READ), text);
  assert.equal(last.type, "response.completed");
  assertBooked(await account.settledRecord(), booked(last.response.usage));
});

test("a response calls a tool and answers its result", responses, async () => {
  const account = await newAccount();
  const tools = [{ type: "function", name: "get_weather", parameters: WEATHER, strict: true }];
  const first = await respond(account.key, { input: QUESTION, tools });
  const [call] = first.output.filter((item) => item.type === "function_call");
  assert.deepEqual([call.name, JSON.parse(call.arguments)], ["get_weather", { city: QUESTION }]);
  const input = [
    { type: "message", role: "user", content: QUESTION },
    { type: "function_call", id: call.id, callId: call.callId, name: call.name, arguments: call.arguments },
    { type: "function_call_output", callId: call.callId, output: "18 degrees" },
  ];
  const second = await respond(account.key, { input, tools });
  assert.ok(textOf(second).startsWith("The sandbox read “18 degrees”."), textOf(second));
  assertBooked(await account.settledRecord(2), booked(second.usage));
});

test("who leaves a streamed response has one settled record", responses, async () => {
  const account = await newAccount();
  const leaving = new AbortController();
  const stream = await respond(account.key, { model: ABORTABLE_SOON_OVER, stream: true }, { fetchOptions: { signal: leaving.signal } });
  await take(stream, 8);
  leaving.abort();
  assertLeft(await account.settledRecord());
});

test("texts become vectors", needs("POST /api/v1/embeddings"), async () => {
  const account = await newAccount();
  const answer = await sdk(account.key).embeddings.generate({ requestBody: { model: EMBEDDER, input: ["one", "two"], dimensions: 8 } });
  assert.deepEqual(answer.data.map((entry) => entry.embedding.length), [8, 8]);
  const record = await account.settledRecord();
  assert.deepEqual([record.prompt_tokens, record.cost], [answer.usage.promptTokens, answer.usage.cost]);
  assert.ok(record.cost > 0);
});

test("documents are ranked", needs("POST /api/v1/rerank"), async () => {
  const account = await newAccount();
  const documents = ["Paris is in France.", "Cats sleep a lot.", "The weather is fine."];
  const requestBody = { model: await modelThatMakes("rerank"), query: QUESTION, documents, topN: 2 };
  const answer = await sdk(account.key).rerank.rerank({ requestBody });
  assert.equal(answer.results.length, 2);
  for (const { index, document } of answer.results) assert.equal(document.text, documents[index]);
  assert.ok(answer.results[0].relevanceScore >= answer.results[1].relevanceScore);
  const record = await account.settledRecord();
  assert.deepEqual([record.status, record.cost], ["completed", answer.usage.cost]);
});

test("an image is made", needs("POST /api/v1/images"), async () => {
  const account = await newAccount();
  const imageGenerationRequest = { model: await modelThatMakes("image"), prompt: "A red dot." };
  const answer = await sdk(account.key).images.generate({ imageGenerationRequest });
  assert.ok(Buffer.from(answer.data[0].b64Json, "base64").length > 60);
  const record = await account.settledRecord();
  assert.deepEqual([record.status, record.cost], ["completed", answer.usage.cost]);
  assert.ok(record.cost > 0);
});

test("a text is spoken", needs("POST /api/v1/audio/speech"), async () => {
  const account = await newAccount();
  const speechRequest = { model: await modelThatMakes("speech"), voice: "alloy", input: PROMPT, responseFormat: "mp3" };
  const sound = await sdk(account.key).tts.createSpeech({ speechRequest });
  let size = 0;
  for await (const piece of sound) size += piece.length;
  assert.ok(size > 100);
  const record = await account.settledRecord();
  assert.equal(record.status, "completed");
  assert.ok(record.cost > 0);
});

test("a sound is written down", needs("POST /api/v1/audio/transcriptions"), async () => {
  const account = await newAccount(0.1); // for a second of sound a fraction of a cent is held
  const inputAudio = { data: wav().toString("base64"), format: "wav" };
  const sttRequest = { model: await modelThatMakes("transcription"), inputAudio };
  const answer = await sdk(account.key).stt.createTranscription({ sttRequest });
  assert.ok(answer.text.length > 0);
  const record = await account.settledRecord();
  assert.deepEqual([record.status, record.cost], ["completed", answer.usage.cost]);
});

test("the key says what it has used", needs("GET /api/v1/key"), async () => {
  const account = await newAccount();
  const client = sdk(account.key);
  await client.chat.send({ chatRequest: { model: MODEL, messages: [{ role: "user", content: PROMPT }] } });
  const { cost } = await account.settledRecord();
  const { data: key } = await client.apiKeys.getCurrentKeyMetadata();
  assert.deepEqual([key.usage, key.usageDaily, key.usageMonthly], [cost, cost, cost]);
  assert.deepEqual([key.limit, key.limitRemaining], [null, null]);
  assert.ok(!account.key.includes(key.label) && key.label.length > 0);
});

test("the credits are those of the account", needs("GET /api/v1/credits"), async () => {
  const account = await newAccount();
  const client = sdk(account.key);
  await client.chat.send({ chatRequest: { model: MODEL, messages: [{ role: "user", content: PROMPT }] } });
  const { cost } = await account.settledRecord();
  const { data } = await client.credits.getCredits();
  assert.deepEqual([data.totalCredits, data.totalUsage], [1, cost]);
});

test("a generation is found by its id, and by its owner alone", needs("GET /api/v1/generation"), async () => {
  const [account, stranger] = [await newAccount(), await newAccount()];
  const { id } = await sdk(account.key).chat.send({ chatRequest: { model: MODEL, messages: [{ role: "user", content: PROMPT }] } });
  const record = await account.settledRecord();
  const { data: found } = await sdk(account.key).generations.getGeneration({ id });
  assert.deepEqual([found.id, found.model, found.totalCost, found.streamed], [id, MODEL, record.cost, false]);
  assert.deepEqual([found.nativeTokensPrompt, found.nativeTokensCompletion], [record.prompt_tokens, record.completion_tokens]);
  assert.equal((await rejection(sdk(stranger.key).generations.getGeneration({ id }))).statusCode, 404);
});

for (const [name, endpoint, ask] of [
  ["responses", "POST /api/v1/responses", (client, model) => client.responses.send({ responsesRequest: { model, input: PROMPT } })],
  ["embeddings", "POST /api/v1/embeddings", (client, model) => client.embeddings.generate({ requestBody: { model, input: PROMPT } })],
  ["rerank", "POST /api/v1/rerank", (client, model) => client.rerank.rerank({ requestBody: { model, query: PROMPT, documents: ["a"] } })],
  ["images", "POST /api/v1/images", (client, model) => client.images.generate({ imageGenerationRequest: { model, prompt: PROMPT } })],
]) {
  test(`${name} refuse with the SDK's own classes of error`, needs(endpoint, "numeric error codes under /api/v1"), async () => {
    const account = await newAccount();
    assert.ok((await rejection(ask(sdk(WRONG_KEY), UNKNOWN_MODEL))) instanceof errors.UnauthorizedResponseError);
    assert.ok((await rejection(ask(sdk(account.key), UNKNOWN_MODEL))) instanceof errors.NotFoundResponseError);
    assert.deepEqual(await account.records(), []);
  });
}
