// The `ai` package from npm in front of the proxy. run.py starts the proxy, and gives its address and a token for each
// test in the environment. Prints one line a test, and as the last one how many passed.

import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const tokens = JSON.parse(process.env.TOKENS);
const city = z.object({ name: z.string(), tags: z.array(z.string()), people: z.number().int() });
const paris = { name: "Paris", tags: ["Paris"], people: 7 };

function model(script) {
  const provider = createOpenAICompatible({
    name: "kimi",
    baseURL: `${process.env.PROXY_URL}/v1`,
    apiKey: tokens[script],
    includeUsage: true,
    supportsStructuredOutputs: true,
  });
  return provider("kimi");
}

const weather = tool({
  description: "The weather in a city",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `sunny in ${city}`,
});

const tests = {
  async "streamText gives the text piece by piece, and the usage"() {
    const result = streamText({ model: model("hello"), prompt: "hi" });
    const pieces = [];
    for await (const piece of result.textStream) pieces.push(piece);
    assert.equal(pieces.join(""), process.env.HELLO);
    assert.equal(await result.finishReason, "stop");
    assert.ok((await result.usage).outputTokens > 5);
  },
  async "streamText keeps thinking apart"() {
    const result = streamText({ model: model("think"), prompt: "hi" });
    assert.equal(await result.text, "答案是 42。");
    assert.equal(await result.reasoningText, process.env.PROTOCOL === "connect" ? "让我想想。" : undefined);
  },
  async "streamText goes the way of a tool to its end"() {
    const result = streamText({
      model: model("tool"),
      prompt: "What is the weather in Paris?",
      tools: { weather },
      stopWhen: stepCountIs(5),
    });
    await result.consumeStream();
    const steps = await result.steps;
    assert.equal(steps.length, 2);
    assert.deepEqual(steps[0].toolCalls[0].input, { city: "Paris" });
    assert.equal(steps[0].finishReason, "tool-calls");
    assert.equal(await result.text, "The results are: sunny in Paris");
  },
  async "generateText with a tool that has to be called"() {
    const result = await generateText({
      model: model("tool-bad"),
      prompt: "?",
      tools: { weather },
      toolChoice: "required",
    });
    assert.equal(result.toolCalls[0].toolName, "weather");
  },
  async "generateObject sends its schema, and gets what fits"() {
    const result = await generateObject({ model: model("json"), schema: city, prompt: "A city" });
    assert.deepEqual(result.object, paris);
  },
  async "generateObject after a second try"() {
    const result = await generateObject({ model: model("json-bad"), schema: city, prompt: "A city" });
    assert.deepEqual(result.object, paris);
  },
  async "a failure is an error with our words, and is not repeated"() {
    const asking = generateObject({ model: model("json-worse"), schema: city, prompt: "A city" });
    await assert.rejects(asking, (error) => error.statusCode === 422 && /did not fit response_format, twice/.test(error.message));
  },
  async "a failure in a stream is told"() {
    const parts = [];
    const result = streamText({ model: model("broken"), prompt: "hi", onError: () => {}, maxRetries: 0 });
    for await (const part of result.fullStream) parts.push(part);
    const told = parts.find((part) => part.type === "error");
    assert.match(JSON.stringify(told?.error?.message ?? told?.error ?? ""), /broke off/);
  },
};

let failed = 0;
for (const [name, test] of Object.entries(tests)) {
  try {
    await test();
    console.log(`ok   ${process.env.PROTOCOL.padEnd(8)} ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAIL ${process.env.PROTOCOL.padEnd(8)} ${name}\n${error.stack}`);
  }
}
console.log(`${Object.keys(tests).length - failed} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);
