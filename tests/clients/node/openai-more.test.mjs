// Do the other endpoints of OpenAI's SDK for Node work unchanged? Responses, embeddings, text completions, images and audio.

import assert from "node:assert/strict";
import test from "node:test";

import OpenAI, { toFile } from "openai";

import {
  ABORTABLE_SOON_OVER, assertBooked, assertLeft, EMBEDDER, MODEL, modelThatMakes, needs, newAccount, PROMPT, QUESTION, rejection, take,
  UNKNOWN_MODEL, URL, wav, WEATHER, WRONG_KEY,
} from "./account.mjs";

const sdk = (key, options = {}) => new OpenAI({ baseURL: `${URL}/v1`, apiKey: key, maxRetries: 0, ...options });
const READ = "The sandbox read “Say hello.”.";
const TOOL = { type: "function", name: "get_weather", parameters: WEATHER, strict: true };

const responses = needs("POST /v1/responses");
const embeddings = needs("POST /v1/embeddings");
const completions = needs("POST /v1/completions");
const images = needs("POST /v1/images/generations");
const speech = needs("POST /v1/audio/speech");
const transcriptions = needs("POST /v1/audio/transcriptions");

const fromResponse = ({ input_tokens: prompt, output_tokens: completion, cost }) => ({ prompt, completion, cost });
const fromCompletion = ({ prompt_tokens: prompt, completion_tokens: completion, cost }) => ({ prompt, completion, cost });

test("a response is billed as told", responses, async () => {
  const account = await newAccount();
  const answer = await sdk(account.key).responses.create({ model: MODEL, input: PROMPT });
  assert.ok(answer.output_text.startsWith(READ), answer.output_text);
  assert.equal(answer.status, "completed");
  const record = await account.settledRecord();
  assertBooked(record, fromResponse(answer.usage));
  assert.equal(record.endpoint, "responses");
});

test("a streamed response ends with its usage", responses, async () => {
  const account = await newAccount();
  let text = "";
  let last;
  for await (const event of await sdk(account.key).responses.create({ model: MODEL, input: PROMPT, stream: true })) {
    if (event.type === "response.output_text.delta") text += event.delta;
    last = event;
  }
  assert.ok(text.startsWith(READ), text);
  assert.equal(last.type, "response.completed");
  assertBooked(await account.settledRecord(), fromResponse(last.response.usage));
});

test("the stream helper gathers the whole response", responses, async () => {
  const account = await newAccount();
  const final = await sdk(account.key).responses.stream({ model: MODEL, input: PROMPT }).finalResponse();
  assert.ok(final.output_text.startsWith(READ), final.output_text);
});

test("a response calls a tool and answers its result", responses, async () => {
  const account = await newAccount();
  const client = sdk(account.key);
  const asked = { role: "user", content: QUESTION };
  const first = await client.responses.create({ model: MODEL, input: [asked], tools: [TOOL] });
  const [call] = first.output.filter((item) => item.type === "function_call");
  assert.deepEqual([call.name, JSON.parse(call.arguments)], ["get_weather", { city: QUESTION }]);
  const result = { type: "function_call_output", call_id: call.call_id, output: "18 degrees" };
  const second = await client.responses.create({ model: MODEL, input: [asked, ...first.output, result], tools: [TOOL] });
  assert.ok(second.output_text.startsWith("The sandbox read “18 degrees”."), second.output_text);
  assertBooked(await account.settledRecord(2), fromResponse(second.usage));
});

test("who leaves a streamed response has one settled record", responses, async () => {
  const account = await newAccount();
  const stream = await sdk(account.key).responses.create({ model: ABORTABLE_SOON_OVER, input: PROMPT, stream: true });
  await take(stream, 8);
  stream.controller.abort();
  assertLeft(await account.settledRecord());
});

test("texts become vectors, as numbers and as base64", embeddings, async () => {
  const account = await newAccount();
  const ask = async (form) =>
    sdk(account.key).embeddings.create({ model: EMBEDDER, input: ["one", "two"], dimensions: 8, encoding_format: form });
  const numbers = await ask("float");
  const decoded = await ask(undefined); // the SDK asks for base64 by itself, and decodes it
  assert.deepEqual(numbers.data.map((entry) => entry.embedding.length), [8, 8]);
  numbers.data[0].embedding.forEach((value, place) => assert.ok(Math.abs(value - decoded.data[0].embedding[place]) < 1e-6));
  const record = await account.settledRecord(2);
  assert.deepEqual([record.prompt_tokens, record.cost], [decoded.usage.prompt_tokens, decoded.usage.cost]);
});

test("a text completion is billed as told, plain and streamed", completions, async () => {
  const account = await newAccount();
  const client = sdk(account.key);
  const plain = await client.completions.create({ model: MODEL, prompt: PROMPT });
  assert.ok(plain.choices[0].text.startsWith(READ), plain.choices[0].text);
  assertBooked(await account.settledRecord(), fromCompletion(plain.usage));
  let text = "";
  let usage;
  for await (const event of await client.completions.create({ model: MODEL, prompt: PROMPT, stream: true })) {
    text += event.choices[0]?.text ?? "";
    usage = event.usage ?? usage;
  }
  assert.equal(text, plain.choices[0].text);
  assertBooked(await account.settledRecord(2), fromCompletion(usage));
});

test("an image is made", images, async () => {
  const account = await newAccount();
  const answer = await sdk(account.key).images.generate({ model: await modelThatMakes("image"), prompt: "A red dot." });
  assert.ok(Buffer.from(answer.data[0].b64_json, "base64").length > 60);
  const record = await account.settledRecord();
  assert.equal(record.status, "completed");
  assert.ok(record.cost > 0);
});

test("a text is spoken", speech, async () => {
  const account = await newAccount();
  const answer = await sdk(account.key).audio.speech.create({ model: await modelThatMakes("speech"), voice: "alloy", input: PROMPT });
  assert.ok((await answer.arrayBuffer()).byteLength > 100);
  assert.ok(answer.headers.get("content-type").startsWith("audio/"));
  const record = await account.settledRecord();
  assert.deepEqual([record.status, record.endpoint], ["completed", "audio/speech"]);
  assert.ok(record.cost > 0);
});

test("a sound is written down", transcriptions, async () => {
  const account = await newAccount(0.1); // for a second of sound a fraction of a cent is held
  const file = await toFile(wav(), "silence.wav");
  const answer = await sdk(account.key).audio.transcriptions.create({ model: await modelThatMakes("transcription"), file });
  assert.ok(answer.text.length > 0);
  const record = await account.settledRecord();
  assert.deepEqual([record.status, record.endpoint], ["completed", "audio/transcriptions"]);
  assert.ok(record.cost > 0);
});

for (const [name, options, ask] of [
  ["responses", responses, (client, model) => client.responses.create({ model, input: PROMPT })],
  ["embeddings", embeddings, (client, model) => client.embeddings.create({ model, input: PROMPT })],
  ["completions", completions, (client, model) => client.completions.create({ model, prompt: PROMPT })],
  ["images", images, (client, model) => client.images.generate({ model, prompt: PROMPT })],
  ["speech", speech, (client, model) => client.audio.speech.create({ model, voice: "alloy", input: PROMPT })],
  ["transcriptions", transcriptions, async (client, model) =>
    client.audio.transcriptions.create({ model, file: await toFile(wav(), "silence.wav") })],
]) {
  test(`${name} are refused with the same classes of error`, options, async () => {
    const account = await newAccount();
    assert.ok((await rejection(ask(sdk(WRONG_KEY), UNKNOWN_MODEL))) instanceof OpenAI.AuthenticationError);
    assert.ok((await rejection(ask(sdk(account.key), UNKNOWN_MODEL))) instanceof OpenAI.NotFoundError);
    assert.deepEqual(await account.records(), []);
  });
}
