# Cells of Julia; the protocol: docs/reference/drivers.md.
module Madang

import REPL

const NONCE = pop!(ENV, "MADANG_NONCE")
delete!(ENV, "DRIVER")
const IN = open(RawFD(3))
cell = "-"
running = false

function frame(kind, id, what = "-", payload = ""; to = stdout)
    bytes = payload isa AbstractString ? Vector{UInt8}(codeunits(payload)) : payload
    write(to, "\x1e$NONCE $kind $id $what $(length(bytes))\n", bytes, "\n")
    flush(to)
end

function take()
    head = split(readline(IN))
    length(head) == 3 || exit(0)
    return head[1], head[2], String(read(IN, parse(Int, head[3])))
end

"The answer; nothing if nobody gives one."
function ask(prompt = "", kind = "prompt")
    frame("input", cell, kind, prompt)
    while true
        op, id, text = take()
        op == "input" && id == cell && return text
        op == "eof" && id == cell && return nothing
        op == "quit" && exit(0)
    end
end

lines_of(trace) = [frame.line for frame in trace if frame.file === :cell]

function problem(id, error, trace)
    while error isa LoadError
        error = error.error
    end
    if error isa InterruptException
        return frame("error", id, "-", "Interrupted\nThe cell was interrupted.")
    end
    lines = lines_of(trace)
    text = sprint(showerror, error)
    found = match(r"cell:(\d+)", text)
    line = !isempty(lines) ? first(lines) : found === nothing ? nothing : found[1]
    name = string(nameof(typeof(error)))
    short = first(split(text, '\n'))
    more = join(["  $frame" for frame in trace if frame.file === :cell], "\n")
    where_ = line === nothing ? "" : "cell:$line: "
    frame("error", id, line === nothing ? "-" : line, "$name\n$short\n$where_$text\n$more")
end

const RICH = ("image/svg+xml", "image/png", "text/html", "text/latex")

function bundle(kind, id, value)
    parts = Pair{String,Any}[]
    for mime in RICH
        Base.invokelatest(showable, mime, value) || continue
        push!(parts, mime => Base.invokelatest(sprint, show, mime, value))
        break
    end
    plain = Base.invokelatest(repr, "text/plain", value, context = :limit => true)
    push!(parts, "text/plain" => plain)
    for (at, (mime, data)) in enumerate(parts)
        frame(at < length(parts) ? "part" : kind, id, mime, data)
    end
end

memory() = parse(Int, split(read("/proc/self/statm", String))[2]) * 4096
# User and system time in hundredths of a second.
function cpu()
    fields = split(last(split(read("/proc/self/stat", String), ") ")))
    return (parse(Int, fields[12]) + parse(Int, fields[13])) * 10_000
end

function run(id, code)
    global cell = id
    frame("begin", id)
    wall, used = time_ns(), cpu()
    status = "ok"
    try
        global running = true
        value = include_string(Main, code, "cell")
        global running = false
        if value !== nothing && !endswith(rstrip(code), ";")
            Base.invokelatest(bundle, "result", id, value)
        end
    catch error
        global running = false
        status = "error"
        problem(id, error, stacktrace(catch_backtrace()))
    end
    flush(stdout)
    frame("fence", id, to = stderr)
    frame("done", id, status, "wall_us=$((time_ns() - wall) ÷ 1000)\ncpu_us=$(cpu() - used)\nmem_bytes=$(memory())")
end

function cut(payload)
    cursor, code = split(payload, '\n', limit = 2)
    return parse(Int, cursor), first(String(code), parse(Int, cursor)), String(code)
end

function complete(id, payload)
    cursor, before, _ = cut(payload)
    found, range, _ = REPL.REPLCompletions.completions(before, lastindex(before))
    names = sort(unique(map(REPL.REPLCompletions.completion_text, found)))
    start = cursor - length(SubString(before, first(range)))
    frame("completions", id, "$(max(0, start)),$cursor", join(names[1:min(end, 500)], "\n"))
end

function inspect(id, payload)
    _, before, code = cut(payload)
    word = match(r"[\w!.]*$", before).match * match(r"^[\w!]*", SubString(code, ncodeunits(before) + 1)).match
    occursin(r"^[A-Za-z_]\w*!?$", word) && isdefined(Main, Symbol(word)) || return frame("inspection", id, "none")
    value = getfield(Main, Symbol(word))
    text = Base.invokelatest(repr, "text/plain", value, context = :limit => true)
    frame("inspection", id, "found", "$(typeof(value)) $word\n$text")
end

guarded(call, id, otherwise...) =
    try
        call()
    catch
        frame(otherwise[1], id, otherwise[2])
    end

# What reads from standard input asks.
struct Input <: IO end
Base.readline(::Input; keep::Bool = false) = (line = ask(); line === nothing ? "" : keep ? line * "\n" : line)
Base.eof(::Input) = false
Base.isopen(::Input) = true
function Base.readlines(input::Input; keep::Bool = false)
    lines = String[]
    while (line = ask()) !== nothing
        push!(lines, keep ? line * "\n" : line)
    end
    return lines
end
Base.read(input::Input, ::Type{String}) = join(readlines(input, keep = true))

function serve()
    ccall(:jl_exit_on_sigint, Cvoid, (Cint,), 0)
    @eval Base stdin = $(Input())
    frame("ready", "-", "-", string(VERSION))
    while true
        try
            op, id, payload = take()
            op == "quit" && exit(0)
            op == "run" && run(id, payload)
            op == "complete" && guarded(() -> complete(id, payload), id, "completions", "0,0")
            op == "inspect" && guarded(() -> inspect(id, payload), id, "inspection", "none")
        catch error
            error isa InterruptException || rethrow()
        end
    end
end

end

Madang.serve()
