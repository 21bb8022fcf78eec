// What does a client's program need besides the client? An account of its own on the running gateway, and its books.
// The same as account.py, for Node.

import assert from "node:assert/strict";
import { setTimeout as pause } from "node:timers/promises";

export const URL = process.env.CLIENTS_GATEWAY_URL ?? "";
const ADMIN_KEY = process.env.CLIENTS_ADMIN_KEY ?? "";
const AWAITED = new Set(JSON.parse(process.env.CLIENTS_AWAITED ?? "[]"));
export const WRONG_KEY = `gw_live_${"1".repeat(49)}`;

export const MODEL = "openai/gpt-4o-mini";
const LONG = 400;
export const ABORTABLE = `${MODEL}:slow;ms=20;tokens=${LONG}`;
export const ABORTABLE_SOON_OVER = `${MODEL}:slow;ms=5;tokens=${LONG}`;
export const EMBEDDER = "openai/text-embedding-3-small";
export const UNKNOWN_MODEL = "nobody/no-such-model";

export const PROMPT = "Say hello.";
export const SAID =
  "The sandbox read “Say hello.”. Prices, tokens and shapes are those of the real service. Ask the same again and you get the same answer.";
export const COST = 0.00002055;
export const QUESTION = "Weather in Paris?";
export const WEATHER = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
};
export const FORECAST = {
  type: "object",
  properties: { city: { type: "string" }, degrees: { type: "integer" }, sky: { type: "string", enum: ["clear", "cloudy"] } },
  required: ["city", "degrees", "sky"],
  additionalProperties: false,
};
export const FORECAST_SAMPLE = { city: QUESTION, degrees: 1, sky: "clear" };
// One red pixel.
export const PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg==";
export const IMAGE = `data:image/png;base64,${PNG}`;

/** Options for a test that needs an endpoint which the gateway may not have yet, as in run.py's AWAITED. */
export const needs = (...endpoints) => {
  const missing = endpoints.filter((endpoint) => AWAITED.has(endpoint));
  return { skip: missing.length > 0 && `awaits ${missing.join(", ")}` };
};

/** The gateway's JSON answer; throws where it refuses. */
async function ask(method, path, key, body) {
  const headers = { authorization: `Bearer ${key}`, "content-type": "application/json" };
  const answer = await fetch(URL + path, { method, headers, body: body && JSON.stringify(body) });
  const text = await answer.text();
  assert.ok(answer.ok, text);
  return JSON.parse(text);
}

let number = 0;

/** A user with so many credits, and without limits of rate. */
export async function newAccount(credits = 1) {
  const name = `client-${process.pid}-${number++}`;
  const { user_id: id, api_key: key } = await ask("POST", "/auth/register", ADMIN_KEY, { username: name, email: `${name}@example.com` });
  if (credits) await ask("POST", "/admin/add_credits", ADMIN_KEY, { user_id: id, credits });
  const account = new Account(id, key);
  const limits = ["requests", "tokens"].flatMap((unit) => ["minute", "hour", "day"].map((window) => [`${unit}_per_${window}`, null]));
  await account.limit(Object.fromEntries(limits));
  return account;
}

class Account {
  constructor(id, key) {
    this.id = id;
    this.key = key;
  }

  async records() {
    return (await ask("GET", "/user/usage/records", this.key)).records;
  }

  /** The newest of exactly so many records, once none is pending. */
  async settledRecord(wanted = 1) {
    const deadline = Date.now() + 10_000;
    for (;;) {
      const found = await this.records();
      if (found.length === wanted && found.every((record) => record.status !== "pending")) return found[0];
      assert.ok(Date.now() < deadline, JSON.stringify(found));
      await pause(20);
    }
  }

  async spent() {
    return (await this.records()).reduce((sum, record) => sum + record.cost, 0);
  }

  async limit(limits) {
    await ask("POST", "/admin/limit", ADMIN_KEY, { user_id: this.id, rate_limits: limits });
  }
}

/** The id of a model with this output modality. */
export async function modelThatMakes(output) {
  const { data } = await (await fetch(`${URL}/v1/models`)).json();
  const found = data.find((model) => model.architecture.output_modalities.includes(output));
  assert.ok(found, `no model makes ${output}`);
  return found.id;
}

/** The journal says what the client was told, and something was charged. */
export function assertBooked(record, { prompt, completion, cost }) {
  assert.deepEqual([record.status, record.settlement_source], ["completed", "usage"]);
  assert.deepEqual([record.prompt_tokens, record.completion_tokens], [prompt, completion]);
  assert.ok(record.cost > 0);
  if (cost !== undefined) assert.equal(record.cost, cost);
}

/** The client left in mid-stream: charged, and for less than the whole answer. */
export function assertCutShort(record) {
  assert.equal(record.status, "cancelled");
  assert.ok(record.completion_tokens > 0 && record.completion_tokens < LONG);
  assert.ok(record.cost > 0);
}

/** The same where the stream does not say who serves it: then it is read to its end, as that provider may bill it whole. */
export function assertLeft(record) {
  assert.equal(record.status, "cancelled");
  assert.ok(record.completion_tokens > 0 && record.completion_tokens <= LONG);
  assert.ok(record.cost > 0);
}

/** The first so many events of a stream; the stream stays open. */
export async function take(stream, wanted) {
  const iterator = stream[Symbol.asyncIterator]();
  const found = [];
  while (found.length < wanted) found.push((await iterator.next()).value);
  return found;
}

/** What a promise was rejected with. */
export async function rejection(promise) {
  try {
    await promise;
  } catch (error) {
    return error;
  }
  throw new assert.AssertionError({ message: "it was not refused" });
}

/** One second of silence. */
export function wav() {
  const rate = 8000;
  const sound = Buffer.alloc(44 + 2 * rate);
  sound.write("RIFF", 0);
  sound.writeUInt32LE(36 + 2 * rate, 4);
  sound.write("WAVEfmt ", 8);
  sound.writeUInt32LE(16, 16);
  sound.writeUInt16LE(1, 20); // PCM
  sound.writeUInt16LE(1, 22); // channels
  sound.writeUInt32LE(rate, 24);
  sound.writeUInt32LE(2 * rate, 28);
  sound.writeUInt16LE(2, 32);
  sound.writeUInt16LE(16, 34);
  sound.write("data", 36);
  sound.writeUInt32LE(2 * rate, 40);
  return sound;
}
