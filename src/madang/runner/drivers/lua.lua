-- Cells of Lua 5.1 to 5.4 and LuaJIT; the protocol: docs/reference/drivers.md.
-- Arguments: the nonce, and a file that appears on an interrupt, which Lua can't catch twice itself.
local nonce, flag = arg[1], arg[2]
local stdin = assert(io.open("/dev/fd/3", "rb"))
local real_stdin, stdout, stderr = io.stdin, io.stdout, io.stderr
local pack = table.pack or function(...) return { n = select("#", ...), ... } end
local unpack = table.unpack or unpack
local load_text = loadstring or load
local INTERRUPTED = setmetatable({}, { __tostring = function() return "interrupted" end })
local cell, stepping, quitting = "-", false, false

local function frame(kind, id, what, payload)
  payload = payload or ""
  stdout:write("\30", nonce, " ", kind, " ", id, " ", what or "-", " ", #payload, "\n", payload, "\n")
  stdout:flush()
end

local function next_op()
  local head = stdin:read("*l")
  if not head then os.exit(0) end
  local op, id, length = head:match("^(%S+) (%S+) (%d+)$")
  local size = tonumber(length)
  return op, id, size > 0 and stdin:read(size) or ""
end

-- Interrupts: looked for every so many instructions, also in coroutines.
local function look()
  local file = io.open(flag)
  if file then
    file:close()
    os.remove(flag)
    if stepping then error(INTERRUPTED, 0) end
  end
end
local function watched() debug.sethook(look, "", 200000) end
local create = coroutine.create
coroutine.create = function(f)
  return create(function(...) watched() return f(...) end)
end
coroutine.wrap = function(f)
  local thread = coroutine.create(f)
  local function pass(good, ...)
    if not good then error((...), 0) end
    return ...
  end
  return function(...) return pass(coroutine.resume(thread, ...)) end
end

-- Input: what reads from stdin asks for a line.
local pending = ""
local function more()
  frame("input", cell, "prompt")
  while true do
    local op, id, text = next_op()
    if op == "input" and id == cell then pending = pending .. text .. "\n" return true end
    if op == "eof" and id == cell then return false end
    if op == "quit" then os.exit(0) end
    look()
  end
end
local function read(what)
  what = type(what) == "string" and what:gsub("^%*", "") or what or "l"
  if what == "a" then
    while more() do end
    local all = pending
    pending = ""
    return all
  elseif type(what) == "number" then
    while #pending < what and more() do end
    if pending == "" and what > 0 then return nil end
    local got = pending:sub(1, what)
    pending = pending:sub(what + 1)
    return got
  end
  if pending == "" and not more() then return nil end
  local line = pending:match("^[^\n]*\n?")
  pending = pending:sub(#line + 1)
  if what == "n" then return tonumber(line) end
  return what == "L" and line or (line:gsub("\n$", ""))
end
local input = {}
function input:read(...)
  local asked, got = pack(...), {}
  for i = 1, math.max(1, asked.n) do got[i] = read(asked[i]) end
  return unpack(got, 1, math.max(1, asked.n))
end
function input:lines(what) return function() return read(what) end end
function input:close() end
function input:setvbuf() return true end
io.stdin = input
local from_file = { read = io.read, lines = io.lines, input = io.input }
local redirected = false
io.read = function(...) return redirected and from_file.read(...) or not redirected and input:read(...) end
io.lines = function(name, ...)
  if name or redirected then return from_file.lines(name, ...) end
  return input:lines(...)
end
io.input = function(file)
  if file == input then redirected = false return input end
  if file then redirected = true return from_file.input(file) end
  return redirected and from_file.input() or input
end

-- Values as people want to see them.
local function show(value, depth, seen)
  if type(value) == "string" then return depth > 0 and string.format("%q", value) or value end
  local meta = getmetatable(value)
  if type(value) ~= "table" or seen[value] or depth > 3 or meta and type(meta) == "table" and meta.__tostring then
    return tostring(value)
  end
  seen[value] = true
  local parts, count = {}, 0
  for i, item in ipairs(value) do
    if i > 100 then break end
    parts[#parts + 1] = show(item, depth + 1, seen)
  end
  for key, item in pairs(value) do
    if not (type(key) == "number" and key >= 1 and key <= #value and key % 1 == 0) then
      count = count + 1
      if count > 100 then parts[#parts + 1] = "..." break end
      local name = type(key) == "string" and key:match("^[%a_][%w_]*$") or "[" .. show(key, depth + 1, seen) .. "]"
      parts[#parts + 1] = name .. " = " .. show(item, depth + 1, seen)
    end
  end
  seen[value] = nil
  return "{" .. table.concat(parts, ", ") .. "}"
end

local function memory()
  local file = io.open("/proc/self/statm")
  if not file then return 0 end
  local _, pages = file:read("*n", "*n")
  file:close()
  return (pages or 0) * 4096
end
-- Wall time to 10 ms: Lua has no finer clock of its own.
local function uptime()
  local file = io.open("/proc/uptime")
  if not file then return os.time() end
  local seconds = file:read("*n")
  file:close()
  return seconds
end

local function on_error(problem)
  if problem == INTERRUPTED then return { problem, "" } end
  return { problem, debug.traceback("", 2):gsub("%[C%]: in function 'xpcall'.*", "") }
end

local function run(id, code)
  cell = id
  frame("begin", id)
  local wall, cpu, good = uptime(), os.clock(), false
  local chunk = load_text("return " .. code, "=cell")
  local problem
  if not chunk then chunk, problem = load_text(code, "=cell") end
  local results, trace = nil, ""
  if chunk then
    os.remove(flag)
    stepping = true
    watched()
    local guarded = pack(xpcall(function() return pack(chunk()) end, on_error))
    stepping = false
    debug.sethook()
    good = guarded[1]
    if good then results = guarded[2] else problem, trace = guarded[2][1], guarded[2][2] end
  end
  io.output():flush()
  if good and results.n > 0 and not (results.n == 1 and results[1] == nil) then
    local shown, parts = nil, {}
    for i = 1, results.n do parts[i] = show(results[i], 0, {}) end
    shown = table.concat(parts, "\t")
    frame("result", id, "text/plain", shown)
  elseif not good then
    local text, line = tostring(problem), nil
    if problem == INTERRUPTED then
      frame("error", id, "-", "Interrupted\nThe cell was interrupted.\n")
    else
      line = text:match("^cell:(%d+):")
      text = text:gsub("^cell:%d+: ", "")
      frame("error", id, line, (chunk and "Error" or "SyntaxError") .. "\n" .. text:gsub("\n", " ") .. "\n" ..
        (line and "cell:" .. line .. ": " or "") .. text .. trace)
    end
  end
  stderr:write("\30", nonce, " fence ", id, " - 0\n\n")
  stderr:flush()
  frame("done", id, good and "ok" or "error", string.format("wall_us=%d\ncpu_us=%d\nmem_bytes=%d",
    math.floor((uptime() - wall) * 1e6 + 0.5), math.floor((os.clock() - cpu) * 1e6), memory()))
end

-- The table that a dotted path before the cursor names, and the word at its end.
local function at_cursor(payload)
  local cursor, code = payload:match("^(%d+)\n(.*)$")
  local before, chars = {}, 0
  for char in code:gmatch("[%z\1-\127\194-\244][\128-\191]*") do
    if chars == tonumber(cursor) then break end
    chars = chars + 1
    before[#before + 1] = char
  end
  local path, word = table.concat(before):match("([%a_][%w_%.:]-)[%.:]([%w_]*)$")
  local place = _G
  if path then
    for name in path:gmatch("[%w_]+") do
      if type(place) == "string" then place = string end
      place = type(place) == "table" and rawget(place, name) or nil
    end
    if type(place) == "string" then place = string end
  else
    word = table.concat(before):match("[%a_][%w_]*$") or ""
  end
  return place, word, chars, code, path
end

local function complete(id, payload)
  local place, word, cursor = at_cursor(payload)
  local found = {}
  if type(place) == "table" then
    for name in pairs(place) do
      if type(name) == "string" and name:sub(1, #word) == word and name:match("^[%a_][%w_]*$") then
        found[#found + 1] = name
      end
    end
  end
  table.sort(found)
  frame("completions", id, (cursor - #word) .. "," .. cursor, table.concat(found, "\n", 1, math.min(#found, 500)))
end

local function inspect(id, payload)
  local place, word = at_cursor(payload)
  local value = type(place) == "table" and word ~= "" and rawget(place, word) or nil
  if value == nil then frame("inspection", id, "none") return end
  local text = type(value) .. " " .. word
  if type(value) == "function" then
    local info = debug.getinfo(value, "S")
    text = text .. "\n" .. (info.what == "C" and "built in" or info.short_src .. ":" .. info.linedefined)
  else
    text = text .. "\n" .. show(value, 0, {})
  end
  frame("inspection", id, "found", text)
end

local ops = { run = run, complete = complete, inspect = inspect, quit = function() os.exit(0) end }
arg = nil
frame("ready", "-", "-", jit and jit.version or _VERSION)
while true do
  local op, id, payload = next_op()
  if ops[op] then ops[op](id, payload) end
end
