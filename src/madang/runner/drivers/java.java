// Cells of Java by jshell's API, in this process; the protocol: docs/reference/drivers.md.
import java.io.*;
import java.lang.management.ManagementFactory;
import java.nio.charset.StandardCharsets;
import java.nio.file.*;
import java.util.*;
import java.util.concurrent.*;
import java.util.stream.*;
import jdk.jshell.*;

public class Driver {
    private static String nonce;
    private static PrintStream out, err;
    private static volatile String cell = "-";
    private static volatile boolean interrupted, busy;
    private static final BlockingQueue<String[]> answers = new LinkedBlockingQueue<>();
    private static final BlockingQueue<String[]> ops = new LinkedBlockingQueue<>();
    private static JShell shell;

    static synchronized void frame(PrintStream to, String kind, String id, String what, String text) {
        byte[] payload = text.getBytes(StandardCharsets.UTF_8);
        String head = "\036" + nonce + " " + kind + " " + id + " " + what + " " + payload.length + "\n";
        ByteArrayOutputStream all = new ByteArrayOutputStream();
        all.writeBytes(head.getBytes(StandardCharsets.UTF_8));
        all.writeBytes(payload);
        all.write('\n');
        to.write(all.toByteArray(), 0, all.size());
        to.flush();
    }

    private static void read(InputStream in) {
        try (DataInputStream data = new DataInputStream(in)) {
            while (true) {
                StringBuilder line = new StringBuilder();
                for (int next = data.read(); next != '\n'; next = data.read()) {
                    if (next < 0) Runtime.getRuntime().halt(0);
                    line.append((char) next);
                }
                String[] head = line.toString().split(" ");
                String text = new String(data.readNBytes(Integer.parseInt(head[2])), StandardCharsets.UTF_8);
                String[] op = {head[0], head[1], text};
                if (head[0].equals("quit")) Runtime.getRuntime().halt(0);
                (head[0].equals("input") || head[0].equals("eof") ? answers : ops).add(op);
            }
        } catch (IOException | RuntimeException error) {
            Runtime.getRuntime().halt(0);
        }
    }

    /** What System.in is: each line that is missing is asked for. */
    static final class Input extends InputStream {
        private byte[] left = {};
        private int at;

        @Override public int read() throws IOException {
            return fill() ? left[at++] & 255 : -1;
        }

        @Override public int read(byte[] to, int offset, int length) throws IOException {
            if (length == 0) return 0;
            if (!fill()) return -1;
            int count = Math.min(length, left.length - at);
            System.arraycopy(left, at, to, offset, count);
            at += count;
            return count;
        }

        @Override public int available() {
            return left.length - at;
        }

        private boolean fill() throws IOException {
            if (at < left.length) return true;
            answers.clear();
            frame(out, "input", cell, "prompt", "");
            try {
                String[] got = answers.take();
                if (got[0].equals("eof")) return false;
                left = (got[2] + "\n").getBytes(StandardCharsets.UTF_8);
                at = 0;
                return true;
            } catch (InterruptedException error) {
                throw new InterruptedIOException("interrupted");
            }
        }
    }

    private static int lineOf(String code, long offset) {
        return 1 + (int) code.substring(0, (int) Math.max(0, Math.min(offset, code.length()))).chars().filter(c -> c == '\n').count();
    }

    private static void error(String name, String text, int line, String more) {
        String flat = text == null ? "" : text.replace("\n", " ");
        String where = line > 0 ? "cell:" + line + ": " : "";
        frame(out, "error", cell, line > 0 ? "" + line : "-", name + "\n" + flat + "\n" + where + name + ": " + flat + more);
    }

    private static boolean run(String code) {
        SourceCodeAnalysis analysis = shell.sourceCodeAnalysis();
        int at = 0;
        String shown = null;
        while (at < code.length() && !interrupted) {
            String rest = code.substring(at);
            if (rest.isBlank()) break;
            SourceCodeAnalysis.CompletionInfo info = analysis.analyzeCompletion(rest);
            String piece = info.source() == null || info.completeness() == SourceCodeAnalysis.Completeness.UNKNOWN ? rest : info.source();
            int skip = rest.length() - info.remaining().length();
            boolean last = info.remaining().isBlank() || info.source() == null;
            shown = null;
            for (SnippetEvent event : shell.eval(piece)) {
                if (event.causeSnippet() != null) continue;
                Snippet snippet = event.snippet();
                if (event.status() == Snippet.Status.REJECTED) {
                    Diag diag = shell.diagnostics(snippet).filter(Diag::isError).findFirst().orElse(null);
                    String text = diag == null ? "not understood" : diag.getMessage(Locale.ROOT);
                    // Positions count from the first character of the piece that is not blank.
                    int lead = piece.length() - piece.stripLeading().length();
                    int line = lineOf(code, at + lead + (diag == null ? 0 : diag.getPosition()));
                    error("CompileError", text, line, "");
                    return false;
                }
                if (event.exception() != null) {
                    Throwable thrown = event.exception();
                    if (interrupted) return false;
                    String name = thrown instanceof EvalException e ? e.getExceptionClassName() : thrown.getClass().getName();
                    String text = thrown.getMessage();
                    if (thrown instanceof UnresolvedReferenceException missing)
                        text = shell.unresolvedDependencies(missing.getSnippet()).collect(Collectors.joining(", ")) + " is not defined yet";
                    int line = 0;
                    StringBuilder trace = new StringBuilder();
                    int first = lineOf(code, at + (piece.length() - piece.stripLeading().length()));
                    for (StackTraceElement step : thrown.getStackTrace()) {
                        String file = step.getFileName();
                        boolean ours = file != null && file.equals("#" + snippet.id());
                        if (ours && line == 0) line = first + step.getLineNumber() - 1;
                        trace.append("\n  at ").append(step);
                    }
                    error(name.substring(name.lastIndexOf('.') + 1), text, line > 0 ? line : first, trace.toString());
                    return false;
                }
                boolean value = snippet.kind() == Snippet.Kind.EXPRESSION || snippet.kind() == Snippet.Kind.VAR
                    && snippet.subKind() == Snippet.SubKind.TEMP_VAR_EXPRESSION_SUBKIND;
                boolean silent = rest.substring(0, skip).stripTrailing().endsWith(";");
                if (value && !silent && event.value() != null && !event.value().isEmpty()) shown = event.value();
            }
            if (last && info.remaining().isBlank()) at = code.length();
            else if (info.source() == null) break;
            else at += skip;
        }
        if (shown != null) frame(out, "result", cell, "text/plain", shown);
        return !interrupted;
    }

    private static long memory() {
        try {
            return Long.parseLong(Files.readString(Path.of("/proc/self/statm")).split(" ")[1]) * 4096;
        } catch (IOException error) {
            return 0;
        }
    }

    private static void serve(String id, String code) {
        var cpu = (com.sun.management.OperatingSystemMXBean) ManagementFactory.getOperatingSystemMXBean();
        cell = id;
        interrupted = false;
        frame(out, "begin", id, "-", "");
        long wall = System.nanoTime(), used = cpu.getProcessCpuTime();
        boolean good = false;
        busy = true;
        try {
            good = run(code);
        } catch (RuntimeException | Error problem) {
            if (!interrupted) error(problem.getClass().getSimpleName(), problem.getMessage(), 0, "");
        }
        busy = false;
        if (interrupted) error("Interrupted", "The cell was interrupted.", 0, "");
        System.out.flush();
        System.err.flush();
        frame(err, "fence", id, "-", "");
        frame(out, "done", id, good && !interrupted ? "ok" : "error", "wall_us=" + (System.nanoTime() - wall) / 1000
            + "\ncpu_us=" + (cpu.getProcessCpuTime() - used) / 1000 + "\nmem_bytes=" + memory());
    }

    private static void complete(String id, String code, int cursor) {
        int[] anchor = {0};
        int end = code.offsetByCodePoints(0, Math.min(cursor, code.codePointCount(0, code.length())));
        String before = code.substring(0, end);
        // Statements before the one with the cursor would confuse it.
        int start = 0;
        for (var info = shell.sourceCodeAnalysis().analyzeCompletion(before); info.source() != null && !info.remaining().isBlank();
                info = shell.sourceCodeAnalysis().analyzeCompletion(before.substring(start)))
            start = before.length() - info.remaining().length();
        String line = before.substring(start);
        List<String> found = shell.sourceCodeAnalysis().completionSuggestions(line, line.length(), anchor).stream()
            .map(SourceCodeAnalysis.Suggestion::continuation).distinct().sorted().limit(500).toList();
        int from = before.codePointCount(0, start + anchor[0]);
        frame(out, "completions", id, from + "," + before.codePointCount(0, end), String.join("\n", found));
    }

    private static void inspect(String id, String code, int cursor) {
        int end = code.offsetByCodePoints(0, Math.min(cursor, code.codePointCount(0, code.length())));
        int start = end;
        while (start > 0 && (Character.isJavaIdentifierPart(code.charAt(start - 1)) || code.charAt(start - 1) == '.')) start--;
        while (end < code.length() && Character.isJavaIdentifierPart(code.charAt(end))) end++;
        String word = code.substring(start, end);
        String text = shell.variables().filter(v -> v.name().equals(word)).map(v -> v.typeName() + " " + v.name() + "\n" + shell.varValue(v))
            .findFirst().orElseGet(() -> shell.methods().filter(m -> m.name().equals(word)).map(m -> m.signature() + " " + m.name())
            .findFirst().orElseGet(() -> shell.sourceCodeAnalysis().documentation(word + "(", word.length() + 1, true).stream()
            .map(d -> d.signature() + (d.javadoc() == null ? "" : "\n" + d.javadoc())).limit(10).collect(Collectors.joining("\n\n"))));
        frame(out, "inspection", id, text.isEmpty() ? "none" : "found", text);
    }

    public static void main(String[] args) throws Exception {
        nonce = args[0];
        out = new PrintStream(new FileOutputStream(FileDescriptor.out), false, StandardCharsets.UTF_8);
        err = new PrintStream(new FileOutputStream(FileDescriptor.err), false, StandardCharsets.UTF_8);
        System.setOut(new PrintStream(new BufferedOutputStream(new FileOutputStream(FileDescriptor.out)), true, StandardCharsets.UTF_8));
        System.setErr(err);
        System.setIn(new Input());
        shell = JShell.builder().executionEngine("local").in(System.in).out(System.out).err(System.err).build();
        for (String name : List.of("java.io.*", "java.math.*", "java.net.*", "java.nio.file.*", "java.util.*",
                "java.util.concurrent.*", "java.util.function.*", "java.util.regex.*", "java.util.stream.*"))
            shell.eval("import " + name + ";");
        sun.misc.Signal.handle(new sun.misc.Signal("INT"), signal -> {
            if (!busy) return;
            interrupted = true;
            // What stops the code is no more than a request to jshell.
            shell.stop();
        });
        Thread reader = new Thread(() -> {
            try {
                read(new FileInputStream("/dev/fd/3"));
            } catch (FileNotFoundException error) {
                Runtime.getRuntime().halt(1);
            }
        });
        reader.setDaemon(true);
        reader.start();
        frame(out, "ready", "-", "-", System.getProperty("java.version"));
        while (true) {
            String[] op = ops.take();
            if (op[0].equals("run")) serve(op[1], op[2]);
            if (op[0].equals("complete") || op[0].equals("inspect")) {
                int cut = op[2].indexOf('\n'), cursor = Integer.parseInt(op[2].substring(0, cut));
                try {
                    if (op[0].equals("complete")) complete(op[1], op[2].substring(cut + 1), cursor);
                    else inspect(op[1], op[2].substring(cut + 1), cursor);
                } catch (RuntimeException error) {
                    if (op[0].equals("complete")) frame(out, "completions", op[1], cursor + "," + cursor, "");
                    else frame(out, "inspection", op[1], "none", "");
                }
            }
        }
    }
}
