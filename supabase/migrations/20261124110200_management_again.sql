-- Management once more: limits in the answer to a verified key, wrong administrator's keys, a bound on keys, signup credits once per
-- address, tenants' audit logs without administrators' addresses, and built-in rows that stay.

-- p: action, address, address_subject, user_agent, request_id, limit. A secret that was presented and is wrong: one audit row per address
-- and minute with a count, and at most `limit` answers a minute. Outcomes: counted, limited (with retry_after).
create function public.note_wrong_secret(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_id bigint := hashtextextended('secret:' || (p ->> 'address_subject'), 0);
    v_now timestamptz := clock_timestamp();
    v_ring bigint[];
begin
    perform public.note_refusals(array[jsonb_build_object(
        'actor', 'address:' || (p ->> 'address_subject'), 'action', p ->> 'action', 'ip', p ->> 'address',
        'user_agent', left(p ->> 'user_agent', 512), 'request_id', p ->> 'request_id')]);
    insert into public.rate_limit_usage (subject, subject_id) values ('address', v_id) on conflict do nothing;
    select public.advance_ring(u.minute_ring, 7, (extract(epoch from v_now) * 1000)::bigint / 10000) into v_ring
    from public.rate_limit_usage u where u.subject = 'address' and u.subject_id = v_id for no key update;
    if v_ring[15] >= (p ->> 'limit')::bigint then
        return jsonb_build_object('outcome', 'limited', 'retry_after', public.retry_after_seconds(
            public.ring_frees_at(v_ring, 7, 10000, 0, v_ring[15] + 1 - (p ->> 'limit')::bigint), v_now));
    end if;
    update public.rate_limit_usage u set minute_ring = public.count_in_ring(v_ring, 7, null, 1, 0), last_used_at = v_now
    where u.subject = 'address' and u.subject_id = v_id;
    return jsonb_build_object('outcome', 'counted');
end $$;
comment on function public.note_wrong_secret is
    'Of an address''s guesses; whether a right secret is let in is never asked here, so that nobody can lock the operator out.';
revoke all on function public.note_wrong_secret(jsonb) from public, anon, authenticated;
grant execute on function public.note_wrong_secret(jsonb) to service_role;

-- Which email addresses have had their signup credits, as HMACs: deleting an account and registering again earns no second ones.
create table public.signup_claims (
    email_hash text primary key check (email_hash ~ '^[0-9a-f]{64}$'),
    claimed_at timestamptz not null default clock_timestamp()
);
comment on table public.signup_claims is 'HMACs of email addresses, under KEY_HASH_SECRETS: nobody without the secret can tell whose they are.';
alter table public.signup_claims enable row level security;
revoke all on public.signup_claims from public, anon, authenticated, service_role;
grant select, insert on public.signup_claims to service_role;

-- p: as before, and email_hashes (under each secret, the current first). An address that has had signup credits gets none.
-- Outcomes: registered, address_limit, username_taken, email_taken, wrong_mode.
create or replace function public.register_user(p jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_user public.users;
    v_key_id bigint;
    v_nanos bigint := (p ->> 'signup_nanos')::bigint;
    v_constraint text;
begin
    -- A switch to live mode waits for this one, or this one for it: play credits of a new account would outlive the switch.
    perform from public.gateway_state where singleton and mode = coalesce(p ->> 'mode', mode) for share;
    if not found then
        return jsonb_build_object('outcome', 'wrong_mode');
    end if;
    -- Counted whatever comes of it: who asks whether a name or an address is taken has tried.
    if p ->> 'address_subject' is not null and not public.count_address('register:' || (p ->> 'address_subject'), 5) then
        return jsonb_build_object('outcome', 'address_limit');
    end if;
    begin
        insert into public.users (username, email, auth_method, trial_expires_at)
        values (p ->> 'username', p ->> 'email', p ->> 'auth_method',
                clock_timestamp() + make_interval(days => (p ->> 'trial_days')::int))
        returning * into v_user;
    exception when unique_violation then
        get stacked diagnostics v_constraint = constraint_name;
        return jsonb_build_object('outcome', case v_constraint when 'users_email_key' then 'email_taken' else 'username_taken' end);
    end;
    insert into public.rate_limit_usage (subject, subject_id) values ('user', v_user.id);
    v_key_id := public.insert_key(v_user.id, p -> 'key', true);
    if v_nanos > 0 and not exists (
           select from public.signup_claims c where c.email_hash in (select jsonb_array_elements_text(p -> 'email_hashes'))) then
        perform public.change_credits(v_user.id, 'grant', v_nanos, 'gateway', 'signup credits', null, null);
        perform public.claim_signup(p);
    end if;
    perform public.write_audit(coalesce(p ->> 'actor', 'user:' || v_user.id), 'create', 'user:' || v_user.id, v_user.id, v_key_id,
                               p ->> 'address', p ->> 'user_agent', (p ->> 'request_id')::uuid, null);
    select * into v_user from public.users where id = v_user.id;
    return jsonb_build_object('outcome', 'registered', 'user_id', v_user.id, 'key_id', v_key_id, 'credits_nanos', v_user.credits_nanos,
                              'subscription_status', v_user.subscription_status, 'trial_expires_at', v_user.trial_expires_at);
end $$;

create function public.claim_signup(p jsonb) returns void language sql set search_path = '' as $$
    insert into public.signup_claims (email_hash)
    select p -> 'email_hashes' ->> 0 where p -> 'email_hashes' ->> 0 is not null on conflict do nothing
$$;
revoke all on function public.claim_signup(jsonb) from public, anon, authenticated;
grant execute on function public.claim_signup(jsonb) to service_role;

-- p: user_id, email_hashes (of the account's address: accounts older than signup_claims claim theirs as they go).
-- Outcomes: deleted, not_found.
create or replace function public.delete_account(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    if exists (select from public.credit_transactions t where t.user_id = v_user.id and t.reason = 'signup credits') then
        perform public.claim_signup(p);
    end if;
    update public.api_keys_new set is_active = false, is_primary = false, revoked_at = clock_timestamp(), encrypted_key = null,
        previous_key_hash = null, previous_hash_secret_id = null, previous_valid_until = null
    where user_id = v_user.id and revoked_at is null;
    update public.api_keys set is_active = false where user_id = v_user.id;
    update public.user_plans set is_active = false where user_id = v_user.id and is_active;
    perform public.expire_unheld(v_user.id, 'account deleted');
    update public.users set username = 'deleted-' || v_user.id, email = 'deleted-' || v_user.id, preferences = '{}', settings = '{}',
        is_active = false, deleted_at = clock_timestamp(), updated_at = clock_timestamp()
    where id = v_user.id;
    perform public.write_audit(p ->> 'actor', 'delete', 'user:' || v_user.id, v_user.id, null, p ->> 'address', p ->> 'user_agent',
                               (p ->> 'request_id')::uuid, null);
    return jsonb_build_object('outcome', 'deleted', 'user_id', v_user.id);
end $$;

-- p: user_id, maker_id, key {...}. Outcomes: created, too_many (with the limit that was met), name_taken, broader, not_found.
create or replace function public.create_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_maker public.api_keys_new := public.acting_key(p);
    v_key public.api_keys_new;
    v_why text;
begin
    if v_user.id is null or v_maker.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    v_key := jsonb_populate_record(v_key, p -> 'key');
    v_why := public.broader_than(v_key, v_maker);
    if v_why is null and exists (select from public.rate_limit_configs c where c.subject = 'key' and c.subject_id = v_maker.id) then
        v_why := 'rate_limits';
    end if;
    if v_why is not null then
        return jsonb_build_object('outcome', 'broader', 'field', v_why);
    elsif (select count(*) from public.api_keys_new k where k.user_id = v_user.id and k.revoked_at is null and k.is_active) >= 50 then
        return jsonb_build_object('outcome', 'too_many', 'limit', 50);
    elsif (select count(*) from public.api_keys_new k where k.user_id = v_user.id and k.revoked_at is null) >= 500 then
        return jsonb_build_object('outcome', 'too_many', 'limit', 500);
    elsif exists (select from public.api_keys_new k where k.user_id = v_user.id and k.revoked_at is null and k.key_name = v_key.key_name) then
        return jsonb_build_object('outcome', 'name_taken');
    end if;
    insert into public.api_keys_new (user_id, key_name, key_prefix, last4, key_hash, hash_secret_id, encrypted_key, environment_tag,
                                     scope_permissions, ip_allowlist, domain_referrers, allowed_models, expiration_date, max_requests,
                                     budget_nanos, budget_window, cache_ttl_seconds)
    values (v_user.id, v_key.key_name, v_key.key_prefix, v_key.last4, v_key.key_hash, v_key.hash_secret_id, v_key.encrypted_key,
            v_key.environment_tag, v_key.scope_permissions, v_key.ip_allowlist, v_key.domain_referrers, v_key.allowed_models,
            v_key.expiration_date, v_key.max_requests, v_key.budget_nanos, v_key.budget_window, v_key.cache_ttl_seconds)
    returning * into v_key;
    insert into public.rate_limit_usage (subject, subject_id, burst_ring, minute_ring, hour_ring, day_ring)
    values ('key', v_key.id, null, null, null, null);
    perform public.audit_key(p, 'create', v_key, jsonb_build_object('key_name', v_key.key_name, 'environment_tag', v_key.environment_tag));
    return jsonb_build_object('outcome', 'created', 'key', public.key_view(v_key));
end $$;

-- A page of a user's own audit log, newest first. What somebody else did to the account shows that, and not from where.
create function public.list_own_audit(
    p_user_id bigint, p_key_id bigint, p_action text, p_start timestamptz, p_end timestamptz, p_before bigint, p_limit int
) returns jsonb language sql stable set search_path = '' as $$
    select coalesce(jsonb_agg(to_jsonb(l) order by l.id desc), '[]') from (
        select a.id, case when o.own then a.actor else 'admin' end as actor, a.action, a.target, a.user_id, a.key_id,
               case when o.own then host(a.ip) end as ip, case when o.own then a.user_agent end as user_agent,
               a.request_id, a.details, a.occurrences, a.created_at
        from public.audit_logs a, lateral (
            select a.actor in ('gateway', 'user:' || p_user_id) or exists (
                select from public.api_keys_new k where k.user_id = p_user_id and a.actor = 'key:' || k.id) as own) as o
        where a.user_id = p_user_id and (p_key_id is null or a.key_id = p_key_id) and (p_action is null or a.action = p_action)
          and (p_start is null or a.created_at >= p_start) and (p_end is null or a.created_at < p_end)
          and (p_before is null or a.id < p_before)
        order by a.id desc limit p_limit) as l
$$;
revoke all on function public.list_own_audit(bigint, bigint, text, timestamptz, timestamptz, bigint, int) from public, anon, authenticated;
grant execute on function public.list_own_audit(bigint, bigint, text, timestamptz, timestamptz, bigint, int) to service_role;

-- The rows that apply to everybody who has none of their own: without them nothing would be limited.
create function public.refuse_built_in_change() returns trigger language plpgsql set search_path = '' as $$
begin
    raise exception '% of a built-in row of % is refused: it applies to everybody without one of their own', lower(tg_op), tg_table_name
        using errcode = 'restrict_violation';
end $$;
revoke all on function public.refuse_built_in_change() from public, anon, authenticated;
grant execute on function public.refuse_built_in_change() to service_role;

insert into public.plans (slug, name, description, daily_request_limit, monthly_request_limit, daily_token_limit, monthly_token_limit)
values ('free', 'Free', 'What an account without a plan and without bought or granted credits may use.', 100, 1000, 10000, 100000),
       ('pay-as-you-go', 'Pay as you go', 'Prepaid credits without a plan: rate limits only.', null, null, null, null)
on conflict (slug) do nothing;
insert into public.rate_limit_configs (subject, subject_id, requests_per_minute, requests_per_hour, requests_per_day,
                                       tokens_per_minute, tokens_per_hour, tokens_per_day)
values ('default', 0, 60, 1000, 10000, 10000, 100000, 1000000)
on conflict do nothing;
create trigger plans_built_in_stay before delete on public.plans
    for each row when (old.slug in ('free', 'pay-as-you-go')) execute function public.refuse_built_in_change();
create trigger plans_built_in_keep_their_slug before update of slug, is_active on public.plans
    for each row when (old.slug in ('free', 'pay-as-you-go') and (new.slug <> old.slug or not new.is_active))
    execute function public.refuse_built_in_change();
create trigger plans_no_truncate before truncate on public.plans for each statement execute function public.refuse_built_in_change();
create trigger rate_limit_configs_default_stays before delete on public.rate_limit_configs
    for each row when (old.subject = 'default') execute function public.refuse_built_in_change();
create trigger rate_limit_configs_default_keeps_its_name before update of subject, subject_id on public.rate_limit_configs
    for each row when (old.subject = 'default' and (new.subject, new.subject_id) <> (old.subject, old.subject_id))
    execute function public.refuse_built_in_change();
create trigger rate_limit_configs_no_truncate before truncate on public.rate_limit_configs
    for each statement execute function public.refuse_built_in_change();

-- p: user_id, plan_id, duration_months, actor, ... Outcomes: assigned, not_found, plan_not_found. Months are the calendar's, in UTC.
create function public.assign_plan_at(p jsonb, p_now timestamptz) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_plan public.plans;
    v_end timestamptz := (p_now at time zone 'UTC' + make_interval(months => (p ->> 'duration_months')::int)) at time zone 'UTC';
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    select * into v_plan from public.plans where id = (p ->> 'plan_id')::bigint and is_active;
    if not found then
        return jsonb_build_object('outcome', 'plan_not_found');
    end if;
    update public.user_plans set is_active = false, end_date = greatest(least(end_date, p_now), start_date + interval '1 microsecond')
    where user_id = v_user.id and is_active;
    insert into public.user_plans (user_id, plan_id, start_date, end_date) values (v_user.id, v_plan.id, p_now, v_end);
    perform public.activate_subscription(v_user.id, false);
    perform public.write_audit(p ->> 'actor', 'assign_plan', 'user:' || v_user.id, v_user.id, null, p ->> 'address', p ->> 'user_agent',
                               (p ->> 'request_id')::uuid, jsonb_build_object('plan_id', v_plan.id, 'until', v_end));
    return jsonb_build_object('outcome', 'assigned', 'user_id', v_user.id, 'plan_id', v_plan.id, 'plan_name', v_plan.name, 'end_date', v_end);
end $$;
revoke all on function public.assign_plan_at(jsonb, timestamptz) from public, anon, authenticated;
grant execute on function public.assign_plan_at(jsonb, timestamptz) to service_role;

create or replace function public.assign_plan(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p); -- before the clock is read, so that a plan never begins before the one it replaces
begin
    return public.assign_plan_at(p, clock_timestamp());
end $$;

-- p: user_id, maker_id, key_id, changes {...}. Outcomes: updated, name_taken, broader, too_many, not_found.
create or replace function public.update_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_maker public.api_keys_new := public.acting_key(p);
    v_key public.api_keys_new;
    v_why text;
begin
    select * into v_key from public.api_keys_new k
    where k.id = (p ->> 'key_id')::bigint and k.user_id = v_user.id and k.revoked_at is null for update;
    if not found or v_maker.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    v_key := jsonb_populate_record(v_key, p -> 'changes');
    v_why := public.broader_than(v_key, v_maker);
    if v_why is not null then
        return jsonb_build_object('outcome', 'broader', 'field', v_why);
    elsif exists (select from public.api_keys_new k where k.user_id = v_user.id and k.revoked_at is null
                  and k.key_name = v_key.key_name and k.id <> v_key.id) then
        return jsonb_build_object('outcome', 'name_taken');
    elsif v_key.is_active and (select count(*) from public.api_keys_new k where k.user_id = v_user.id and k.revoked_at is null
                               and k.is_active and k.id <> v_key.id) >= 50 then
        return jsonb_build_object('outcome', 'too_many');
    end if;
    update public.api_keys_new k set
        key_name = v_key.key_name, scope_permissions = v_key.scope_permissions, ip_allowlist = v_key.ip_allowlist,
        domain_referrers = v_key.domain_referrers, allowed_models = v_key.allowed_models, expiration_date = v_key.expiration_date,
        max_requests = v_key.max_requests, budget_nanos = v_key.budget_nanos, budget_window = v_key.budget_window,
        cache_ttl_seconds = v_key.cache_ttl_seconds, is_active = v_key.is_active, updated_at = clock_timestamp()
    where k.id = v_key.id returning * into v_key;
    perform public.audit_key(p, 'update', v_key, jsonb_build_object('fields', (select jsonb_agg(f) from jsonb_object_keys(p -> 'changes') f)));
    return jsonb_build_object('outcome', 'updated', 'key', public.key_view(v_key));
end $$;

-- p: user_id (null: anybody's, for an administrator), maker_id (null: an administrator), key_id. A key of a lesser environment ends none of
-- a higher one, as it changes and rotates none. Outcomes: revoked, broader, not_found.
create or replace function public.revoke_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p || jsonb_build_object('user_id', coalesce((p ->> 'user_id')::bigint, (
        select k.user_id from public.api_keys_new k where k.id = (p ->> 'key_id')::bigint))));
    v_maker public.api_keys_new := public.acting_key(p);
    v_key public.api_keys_new;
begin
    select * into v_key from public.api_keys_new k
    where k.id = (p ->> 'key_id')::bigint and k.user_id = v_user.id and k.revoked_at is null;
    if not found or (p ->> 'maker_id' is not null and v_maker.id is null) then
        return jsonb_build_object('outcome', 'not_found');
    elsif public.environment_rank(v_key.environment_tag) > public.environment_rank(v_maker.environment_tag) and v_maker.id is not null then
        return jsonb_build_object('outcome', 'broader', 'field', 'environment_tag');
    end if;
    update public.api_keys_new k set is_active = false, is_primary = false, revoked_at = clock_timestamp(), updated_at = clock_timestamp(),
        encrypted_key = null, previous_key_hash = null, previous_hash_secret_id = null, previous_valid_until = null
    where k.id = v_key.id returning * into v_key;
    perform public.audit_key(p, 'delete', v_key, jsonb_build_object('key_name', v_key.key_name));
    return jsonb_build_object('outcome', 'revoked', 'user_id', v_key.user_id, 'key_id', v_key.id);
end $$;

create or replace function public.schema_version() returns bigint language sql immutable set search_path = '' as $$
    select 20261124110200::bigint
$$;

notify pgrst, 'reload schema';
