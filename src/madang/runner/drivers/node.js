// Cells of Node.js and TypeScript; the protocol: docs/reference/drivers.md. Evaluation, top-level
// await and completion are those of Node's own REPL.
"use strict";
(() => {
const fs = require("fs"), repl = require("repl"), util = require("util"), path = require("path");
const { PassThrough, Writable } = require("stream");
const nonce = process.env.MADANG_NONCE, typescript = process.env.MADANG_TYPESCRIPT;
for (const name of ["MADANG_NONCE", "DRIVER", "MADANG_TYPESCRIPT"]) delete process.env[name];

// Everything goes out in order and at once.
function write(fd, data) {
  const bytes = typeof data === "string" ? Buffer.from(data) : data;
  for (let done = 0; done < bytes.length; ) {
    try {
      done += fs.writeSync(fd, bytes, done);
    } catch (error) {
      if (error.code !== "EAGAIN") throw error;
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1);
    }
  }
}
for (const stream of [process.stdout, process.stderr]) {
  const fd = stream.fd;
  stream.write = (data, encoding, done) => {
    write(fd, typeof data === "string" ? Buffer.from(data, typeof encoding === "string" ? encoding : "utf8") : data);
    const call = typeof encoding === "function" ? encoding : done;
    if (call) process.nextTick(call);
    return true;
  };
}
function frame(kind, id, what = "-", payload = "") {
  const bytes = Buffer.isBuffer(payload) ? payload : Buffer.from(payload);
  write(1, Buffer.concat([Buffer.from(`\x1e${nonce} ${kind} ${id} ${what} ${bytes.length}\n`), bytes, Buffer.from("\n")]));
}

// Operations are read by a thread, so that a cell can wait for one while timers of others go on.
const { Worker, MessageChannel, receiveMessageOnPort } = require("worker_threads");
const { port1: port, port2 } = new MessageChannel(), arrived = new Int32Array(new SharedArrayBuffer(4));
const reader = new Worker(`
  const { port, arrived } = require("worker_threads").workerData;
  const tell = (data) => { port.postMessage(data); Atomics.add(arrived, 0, 1); Atomics.notify(arrived, 0); };
  new (require("net").Socket)({ fd: 3, readable: true, writable: false }).on("data", tell).on("close", () => tell(null));
`, { eval: true, workerData: { port: port2, arrived }, transferList: [port2], stdout: true, stderr: true });
reader.unref();
let buffer = Buffer.alloc(0);
const ops = [];
function take(data) {
  if (data === null) process.exit(0);
  buffer = Buffer.concat([buffer, data]);
  for (;;) {
    const end = buffer.indexOf(10);
    if (end < 0) return;
    const [op, id, length] = buffer.subarray(0, end).toString().split(" ");
    const stop = end + 1 + Number(length);
    if (buffer.length < stop) return;
    ops.push([op, id, buffer.subarray(end + 1, stop).toString()]);
    buffer = Buffer.from(buffer.subarray(stop));
  }
}
port.on("message", (data) => {
  take(data);
  const at = answered ? ops.findIndex(([op, id]) => isAnswer(op, id)) : -1;
  if (at >= 0) {
    const [[op, , text]] = ops.splice(at, 1), call = answered;
    answered = null;
    call(op === "eof" ? null : text + "\n");
  }
  serve();
});
const isAnswer = (op, id) => id === cell && (op === "input" || op === "eof");
function ask(prompt, secret = false) {
  frame("input", cell, secret ? "password" : "prompt", prompt);
  for (;;) {
    const at = ops.findIndex(([op, id]) => isAnswer(op, id) || op === "quit");
    if (at >= 0) {
      const [[op, , text]] = ops.splice(at, 1);
      if (op === "quit") process.exit(0);
      return op === "eof" ? null : text;
    }
    const seen = Atomics.load(arrived, 0), more = receiveMessageOnPort(port);
    if (more) take(more.message);
    else Atomics.wait(arrived, 0, seen);
  }
}
globalThis.prompt = (text = "") => ask(String(text));

// What code reads from process.stdin, also by readline, is asked for line by line.
let input = null, answered = null;
class Input extends require("stream").Readable {
  _read() {
    // Not at once: whoever has read its line would ask for one more.
    setTimeout(() => {
      if (this !== input || cell === "-" || this.readableFlowing === false) return;
      answered = (line) => this.push(line);
      frame("input", cell, "prompt", "");
    }, 10);
  }
  // One that was left waiting is done with, with its cell.
  static drop() {
    if (answered) input = answered = null;
  }
}
Object.defineProperty(process, "stdin", { configurable: true, get: () => input ??= new Input({ highWaterMark: 1 }) });

const server = repl.start({
  prompt: "", input: new PassThrough(), output: new Writable({ write: (data, _, done) => done() }),
  terminal: false, useGlobal: true, breakEvalOnSigint: true, ignoreUndefined: true,
});
server.removeAllListeners("SIGINT");
server.on("exit", () => process.exit(0));

let cell = "-", running = false, broken = null;
// An interrupt of what runs at once is the REPL's business, and it can't share the signal with us.
const interrupted = () => broken?.(Object.assign(new Error("The cell was interrupted."), { name: "Interrupted" }));
process.on("SIGINT", interrupted);
const failed = (error) => broken ? broken(error) : write(2, util.inspect(error) + "\n");
process.on("uncaughtException", failed);
// The REPL tells errors of what it evaluates to its domain, if it has one.
server._domain?.removeAllListeners("error");
server._domain?.on("error", failed);

function withoutTypes(code) {
  if (!typescript) return code;
  const ts = require(typescript);
  const found = ts.transpileModule(code, {
    reportDiagnostics: true, fileName: "cell.ts",
    compilerOptions: { target: "es2022", module: "esnext", isolatedModules: false, preserveValueImports: true, sourceMap: true },
  });
  const bad = found.diagnostics.find((each) => each.category === ts.DiagnosticCategory.Error);
  if (bad) {
    const line = code.slice(0, bad.start).split("\n").length;
    throw Object.assign(new SyntaxError(ts.flattenDiagnosticMessageText(bad.messageText, " ")), { cellLine: line });
  }
  places = linesOf(JSON.parse(found.sourceMapText).mappings);
  return found.outputText.replace(/^export \{\};\n?|^\/\/# sourceMappingURL=.*$/gm, "");
}
// Of a source map: the line that each line was made of.
function linesOf(mappings) {
  const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  let line = 0;
  return mappings.split(";").map((segments) => {
    let first = null;
    for (const segment of segments.split(",").filter(Boolean)) {
      const numbers = [];
      for (let at = 0, value = 0, shift = 0; at < segment.length; at++) {
        const digit = digits.indexOf(segment[at]);
        value |= (digit & 31) << shift;
        if (digit & 32) shift += 5;
        else numbers.push(value & 1 ? -(value >> 1) : value >> 1), value = shift = 0;
      }
      line += numbers[2] ?? 0;
      first ??= line;
    }
    return first === null ? null : first + 1;
  });
}
let places = null;

// `import` statements, which the REPL refuses, as what they mean.
function withImports(code) {
  return code
    .replace(/^([ \t]*)import\s+\*\s+as\s+(\w+)\s+from\s+(['"][^'"]+['"]);?/gm, "$1const $2 = await import($3);")
    .replace(/^([ \t]*)import\s+(\w+)\s*,?\s*(\{[^}]*\})?\s*from\s+(['"][^'"]+['"]);?/gm, (_, space, name, names, from) =>
      `${space}const ${name} = (await import(${from})).default;` + (names ? ` const ${names.replace(/\bas\b/g, ":")} = await import(${from});` : ""))
    .replace(/^([ \t]*)import\s+(\{[^}]*\})\s*from\s+(['"][^'"]+['"]);?/gm, (_, space, names, from) =>
      `${space}const ${names.replace(/\bas\b/g, ":")} = await import(${from});`)
    .replace(/^([ \t]*)import\s+(['"][^'"]+['"]);?/gm, "$1await import($2);");
}

// What is declared once can be declared again, as people run cells twice.
function again(code) {
  return code.replace(/^(?:const|let)(?=[ \t])/gm, "var").replace(/^class[ \t]+(\w+)/gm, "var $1 = class $1");
}

function lineOf(error) {
  if (error?.cellLine) return error.cellLine;
  const found = /(?:^|[\s(])cell:(\d+)/m.exec(String(error?.stack ?? ""));
  return found ? places?.[found[1] - 1] ?? Number(found[1]) : null;
}

function show(value) {
  const data = {};
  if (typeof value === "string") return { "text/plain": util.inspect(value) };
  try {
    for (const [method, mime] of [["_toHtml", "text/html"], ["_toSvg", "image/svg+xml"], ["_toPng", "image/png"]])
      if (value && typeof value[method] === "function") {
        const made = value[method]();
        data[mime] = mime === "image/png" && typeof made === "string" ? Buffer.from(made, "base64") : made;
      }
  } catch {}
  return { ...data, "text/plain": util.inspect(value, { depth: 4, maxArrayLength: 100, breakLength: 100 }) };
}
function bundle(kind, id, value) {
  const found = Object.entries(show(value));
  found.forEach(([mime, data], at) => frame(at + 1 < found.length ? "part" : kind, id, mime, data));
}
globalThis.display = (value) => bundle("display", cell, value);

async function run(id, code) {
  cell = id;
  frame("begin", id);
  const wall = process.hrtime.bigint(), cpu = process.cpuUsage();
  let status = "ok";
  try {
    const text = again(withImports(withoutTypes(code)));
    const value = await new Promise((resolve, reject) => {
      broken = reject;
      process.removeListener("SIGINT", interrupted);
      try {
        server.eval(text + "\n", server.context, "cell", (error, value) => error ? reject(error) : resolve(value));
      } finally {
        process.on("SIGINT", interrupted);
      }
    });
    if (value !== undefined && !/;\s*$/.test(code)) bundle("result", id, value);
  } catch (error) {
    status = "error";
    let problem = error;
    if (error instanceof repl.Recoverable) problem = error.err;
    if (problem?.code === "ERR_SCRIPT_EXECUTION_INTERRUPTED") problem = Object.assign(new Error("The cell was interrupted."), { name: "Interrupted" });
    const line = lineOf(problem);
    const name = problem?.name ?? "Error", text = String(problem?.message ?? util.inspect(problem)).replace(/\n/g, " ");
    const stack = String(problem?.stack ?? `${name}: ${text}`).split("\n").filter((each) => !/\bnode:|\(?repl:|REPLServer|\[eval\]/.test(each));
    frame("error", id, line ?? "-", `${name}\n${text}\n${name === "Interrupted" ? "" : stack.join("\n")}`);
  }
  broken = null;
  Input.drop();
  // What was printed by callbacks that are due belongs to the cell.
  await new Promise((resolve) => setImmediate(resolve));
  const used = process.cpuUsage(cpu);
  write(2, `\x1e${nonce} fence ${id} - 0\n\n`);
  frame("done", id, status, [
    `wall_us=${(process.hrtime.bigint() - wall) / 1000n}`, `cpu_us=${used.user + used.system}`,
    `mem_bytes=${process.memoryUsage.rss()}`,
  ].join("\n"));
}

function cut(payload) {
  const end = payload.indexOf("\n"), code = payload.slice(end + 1);
  return [[...code].slice(0, Number(payload.slice(0, end))).join(""), code];
}
function complete(id, payload) {
  const [before] = cut(payload), line = before.slice(before.lastIndexOf("\n") + 1);
  return new Promise((resolve) => server.complete(line, (error, found) => {
    const [names, on] = error ? [[], ""] : found, end = [...before].length;
    const matches = [...new Set(names.filter((each) => each))].slice(0, 500);
    frame("completions", id, `${end - [...(on ?? "")].length},${end}`, matches.join("\n"));
    resolve();
  }));
}
function inspect(id, payload) {
  const [before, code] = cut(payload);
  const word = /[\w$.]*$/.exec(before)[0] + /^[\w$]*/.exec(code.slice(before.length))[0];
  let value;
  try {
    if (/^[A-Za-z_$][\w$]*(\.[A-Za-z_$][\w$]*)*$/.test(word)) value = require("vm").runInThisContext(word);
  } catch {}
  if (value === undefined) return frame("inspection", id, "none");
  const text = typeof value === "function" ? String(value) : util.inspect(value, { depth: 2 });
  frame("inspection", id, "found", `${typeof value} ${word}\n${text}`);
}

async function serve() {
  if (running) return;
  running = true;
  while (ops.length) {
    const [op, id, payload] = ops.shift();
    if (op === "quit") process.exit(0);
    if (op === "run") await run(id, payload);
    if (op === "complete") await complete(id, payload);
    if (op === "inspect") inspect(id, payload);
  }
  running = false;
}
frame("ready", "-", "-", typescript ? require(typescript).version : process.versions.node);
})();
