// Lucene itself, the core of OpenSearch and Elasticsearch, with the features that `sparse_vector` and `rank_features` store:
// a FeatureField per term, and a linear query per term of the query. examples/lucene.py runs it.
//
//   java -cp lucene-core.jar examples/Lucene.java build bulk.ndjson INDEX      prints a JSON line of facts
//   java -cp lucene-core.jar examples/Lucene.java search INDEX K < queries     one query per line: 7592:1.5 2030:0.25
//
// A line of hits begins with its nanoseconds: 81250 17:3.25 4:2.5 are the documents in lines 17 and 4 of the bulk file.

import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.stream.Collectors;
import org.apache.lucene.document.Document;
import org.apache.lucene.document.FeatureField;
import org.apache.lucene.index.DirectoryReader;
import org.apache.lucene.index.IndexWriter;
import org.apache.lucene.index.IndexWriterConfig;
import org.apache.lucene.index.LogDocMergePolicy;
import org.apache.lucene.index.SerialMergeScheduler;
import org.apache.lucene.search.BooleanClause;
import org.apache.lucene.search.BooleanQuery;
import org.apache.lucene.search.IndexSearcher;
import org.apache.lucene.search.ScoreDoc;
import org.apache.lucene.store.MMapDirectory;
import org.apache.lucene.util.Version;

public class Lucene {
    public static void main(String[] args) throws Exception {
        if (args[0].equals("build")) build(Path.of(args[1]), Path.of(args[2]));
        else search(Path.of(args[1]), Integer.parseInt(args[2]));
    }

    static void build(Path bulk, Path folder) throws Exception {
        long start = System.nanoTime();
        int count = 0;
        // merges of neighbours keep the order of the documents, so that document n is the n-th of the file
        IndexWriterConfig config = new IndexWriterConfig(null)
                .setMergePolicy(new LogDocMergePolicy()).setMergeScheduler(new SerialMergeScheduler());
        try (MMapDirectory directory = new MMapDirectory(folder);
                IndexWriter writer = new IndexWriter(directory, config);
                BufferedReader lines = Files.newBufferedReader(bulk, StandardCharsets.UTF_8)) {
            while (lines.readLine() != null) {  // the action; the document follows
                String line = lines.readLine();
                Document document = new Document();
                // {"terms": {"7592": 1.5, "2030": 0.25}, ...: digits and numbers, as examples/lucene.py writes them
                String terms = line.substring(line.indexOf('{', 1) + 1, line.indexOf('}'));
                for (String feature : terms.isEmpty() ? new String[0] : terms.split(", ")) {
                    String[] parts = feature.split("\": ");
                    document.add(new FeatureField("terms", parts[0].substring(1), Float.parseFloat(parts[1])));
                }
                writer.addDocument(document);
                count++;
            }
            writer.forceMerge(1);
        }
        double seconds = (System.nanoTime() - start) / 1e9;
        System.out.printf("{\"lucene\": \"%s\", \"documents\": %d, \"seconds\": %.3f}%n", Version.LATEST, count, seconds);
    }

    static void search(Path folder, int k) throws Exception {
        BooleanQuery.setMaxClauseCount(1 << 20);
        BufferedReader input = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        List<BooleanQuery> queries = input.lines().map(Lucene::query).collect(Collectors.toList());
        try (DirectoryReader reader = DirectoryReader.open(new MMapDirectory(folder))) {
            IndexSearcher searcher = new IndexSearcher(reader);
            searcher.setQueryCache(null);
            for (int round = 0; round < 3; round++)  // the compiler needs some before times mean anything
                for (BooleanQuery query : queries) searcher.search(query, k);
            for (BooleanQuery query : queries) {
                long start = System.nanoTime();
                ScoreDoc[] hits = searcher.search(query, k).scoreDocs;
                StringBuilder line = new StringBuilder().append(System.nanoTime() - start);
                for (ScoreDoc hit : hits) line.append(' ').append(hit.doc).append(':').append(hit.score);
                System.out.println(line);
            }
        }
    }

    static BooleanQuery query(String line) {
        BooleanQuery.Builder query = new BooleanQuery.Builder();
        for (String term : line.isEmpty() ? new String[0] : line.split(" ")) {
            String[] parts = term.split(":");
            query.add(FeatureField.newLinearQuery("terms", parts[0], Float.parseFloat(parts[1])), BooleanClause.Occur.SHOULD);
        }
        return query.build();
    }
}
